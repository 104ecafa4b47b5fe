"""The words of captions as coco-caption has them: by Stanford's Penn Treebank tokenizer, which pycocoevalcap brings."""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import as_file, files

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from pipeline.metrics.java import UnavailableError, run_java

PROTOCOL = (
    f"PTBTokenizer of Stanford CoreNLP 3.4.1 (Java) in pycocoevalcap {version('pycocoevalcap')}, lower-cased, "
    "punctuation dropped as coco-caption does"
)
START_SECONDS = 60.0
CAPTIONS_A_SECOND = 1000
"""Far fewer than a slow machine splits, so that only a program that hangs is stopped."""

# The tokenizer takes each of these for the end of a line, and a caption is a line.
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))


def ptb_words(captions: Sequence[str]) -> list[list[str]]:
    """Split captions into words: lower-cased, and without the tokens that coco-caption calls punctuation.

    Raises `UnavailableError` where Java is missing or its program fails.
    """
    if not captions:
        return []
    lines = "".join(caption.translate(LINE_ENDS) + "\n" for caption in captions)
    with as_file(files("pycocoevalcap") / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR) as jar:
        program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        said = run_java("the PTB tokenizer", program, lines, START_SECONDS + len(captions) / CAPTIONS_A_SECOND)
    tokenized = said.split("\n")[:-1]
    if len(tokenized) != len(captions):
        raise UnavailableError(f"the PTB tokenizer gave {len(tokenized)} lines for {len(captions)} captions")
    return [[word for word in line.split() if word not in PUNCTUATIONS] for line in tokenized]
