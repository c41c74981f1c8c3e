"""The 16 prompts of the SmolLM2 answers: plain and chat, short and long, code, figures, Unicode."""

CHAT = [
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "What is 17 times 23? Show your steps.",
    "Translate to French: The cat sleeps on the warm roof.",
    'Summarize: "Bees visit flowers to collect nectar and pollen. In doing so they carry pollen '
    "from one blossom to the next, which lets the plants form seeds. Without bees many crops "
    'would yield far less fruit."',
    "List three differences between a virus and a bacterium.",
    "¿Cuál es la montaña más alta de América del Sur? 🏔️ Réponds en anglais, s'il te plaît.",
]

PLAIN = [
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. "
    "The quick brown fox",
    "1, 1, 2, 3, 5, 8, 13,",
    "A",
    "SELECT name, COUNT(*) FROM orders\nWHERE total > 100\nGROUP BY",
    "   \n\n\tIndented   text  with odd   spacing\r\nand a second line:",
    "Photosynthesis is the process by which green plants, algae and some bacteria turn light into "
    "chemical energy. Light is absorbed by chlorophyll in the chloroplasts. In the first stage, "
    "water is split, oxygen is set free, and the energy is stored in ATP and NADPH. In the second "
    "stage, the Calvin cycle, carbon dioxide from the air is built into sugars with the help of "
    "that energy. The rate of the whole depends on the strength of the light, on the temperature "
    "and on how much carbon dioxide and water there are. In strong light the leaf protects itself "
    "by turning surplus energy into heat. To sum up, photosynthesis",
]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def texts() -> list[str]:
    """Every prompt as the text that is tokenized, special tokens parsed, without BOS."""
    chat = [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for question in CHAT
    ]
    return chat + PLAIN
