"""A check as JUnit XML, which CI systems show: one testcase per comparison.

The elements are those of https://github.com/testmoapp/junitxml, which writes down what CI systems
read.
"""

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

# What XML 1.0 cannot hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(night: Mapping[str, Any]) -> bytes:
    """The document of a night (night.json) as an XML file."""
    compared, skipped = night["comparisons"], night["skipped"]
    failures = [c for c in compared if not c["equal"]]
    suite = ElementTree.Element(
        "testsuite",
        name=_text(f"orcd_batch {night['model_name'] or 'check'}"),
        tests=str(len(compared) + len(skipped)),
        failures=str(len(failures)),
        errors="0",
        skipped=str(len(skipped)),
        time=f"{night['seconds']:.3f}",
        timestamp=str(night["started"]),
    )
    _properties(suite, night)
    times = {v["name"]: v["seconds"] for v in night["variations"]}
    for found in compared:
        case = _case(suite, found, times.get(found["name"]))
        if not found["equal"]:
            message = _text(found["explanation"])
            failure = ElementTree.SubElement(case, "failure", message=message, type="difference")
            failure.text = _text(f"{found['explanation']}\n{night['cause']}")
    for found in skipped:
        case = _case(suite, found, None)
        ElementTree.SubElement(case, "skipped", message=_text(found["reason"]))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    encoded: bytes = ElementTree.tostring(suites, "utf-8", xml_declaration=True)
    return encoded + b"\n"


def _case(suite: ElementTree.Element, found: Mapping[str, Any], seconds: float | None) -> Any:
    return ElementTree.SubElement(
        suite,
        "testcase",
        classname="orcd_batch.check",
        name=_text(f"{found['name']}: {found['title']}"),
        time=f"{seconds or 0.0:.3f}",
    )


def _properties(suite: ElementTree.Element, night: Mapping[str, Any]) -> None:
    properties = ElementTree.SubElement(suite, "properties")
    names = ("verdict", "cause", "run_hash", "baseline_hash", "model_hash", "engine", "device")
    values = {name: night[name] for name in (*names, "last_good_night", "failing_since")}
    values |= {f"changed.{c['field']}": f"{c['before']} → {c['now']}" for c in night["changed"]}
    for name, value in values.items():
        if value is not None:
            ElementTree.SubElement(properties, "property", name=_text(name), value=_text(value))


def _text(value: object) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(value))
