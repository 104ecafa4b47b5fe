"""The tokenizer of coco-caption: Stanford's Penn Treebank tokenizer, a Java program included in pycocoevalcap."""

from collections.abc import Sequence
from importlib.resources import as_file, files

from pipeline.captions.languages import ENGLISH
from pipeline.captions.tokenization import Tokenization, installed_version
from pipeline.metrics.java import UnavailableError, run_java

PTB = Tokenization(
    tokenizer="ptb",
    version="3.4.1",
    source=f"Stanford CoreNLP's PTBTokenizer in pycocoevalcap {installed_version('pycocoevalcap')}",
    language=ENGLISH,
    lowercase=True,
    punctuation="drop",
)

STARTUP_SECONDS = 60.0
"""Timeout without captions."""
SECONDS_PER_CAPTION = 0.001
"""Additional timeout for each caption."""

# The tokenizer reads one caption per line, and ends a line at each of these characters.
_LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))


def tokenize_ptb(captions: Sequence[str]) -> list[list[str]]:
    """Tokenize captions as coco-caption does: lowercase them and drop punctuation.

    Raises:
        UnavailableError: Java is missing or its program fails.
    """
    # Imported here, so that the other metrics need no pycocoevalcap.
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    if not captions:
        return []
    text = "".join(caption.translate(_LINE_ENDS) + "\n" for caption in captions)
    with as_file(files("pycocoevalcap") / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR) as jar:
        arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        timeout = STARTUP_SECONDS + SECONDS_PER_CAPTION * len(captions)
        lines = run_java("the PTB tokenizer", arguments, text, timeout).split("\n")[:-1]
    if len(lines) != len(captions):
        raise UnavailableError(
            f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions. Reinstall pycocoevalcap."
        )
    return [[word for word in line.split() if word not in PUNCTUATIONS] for line in lines]
