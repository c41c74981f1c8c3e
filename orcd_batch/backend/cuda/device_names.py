"""The GPUs that this process sees, by name, without opening them."""

from orcd_batch.backend.cuda.driver import call


def device_names() -> list[str]:
    """One name a GPU, in CUDA's order. Raises DeviceError where the driver fails."""
    from cuda.bindings import driver

    call(driver.cuInit(0))
    devices = [call(driver.cuDeviceGet(i)) for i in range(call(driver.cuDeviceGetCount()))]
    return [
        call(driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode() for device in devices
    ]
