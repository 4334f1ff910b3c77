"""Text as training data: the standard library's source or a file, its symbols, and batches for truncated BPTT."""

from __future__ import annotations

import sysconfig
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Modules that every supported Python has as source, in alphabetical order. The list is fixed, not a directory listing, so
# that the text does not depend on how an interpreter was packaged; a module that one lacks is left out and counted.
STANDARD_LIBRARY = """
argparse ast asyncio/base_events asyncio/events asyncio/futures asyncio/locks asyncio/queues asyncio/runners
asyncio/selector_events asyncio/streams asyncio/subprocess asyncio/tasks asyncio/unix_events base64 bdb bz2 calendar cmd
code codecs collections/__init__ concurrent/futures/_base concurrent/futures/process concurrent/futures/thread
configparser contextlib copy csv dataclasses difflib dis doctest email/feedparser email/generator email/header
email/headerregistry email/message email/parser email/policy email/utils enum filecmp fileinput fnmatch fractions ftplib
functools getopt gettext glob gzip hashlib heapq hmac html/parser http/client http/cookiejar http/cookies http/server
imaplib importlib/_bootstrap importlib/_bootstrap_external importlib/util inspect ipaddress json/decoder json/encoder
linecache logging/__init__ logging/config logging/handlers lzma mailbox mimetypes modulefinder multiprocessing/connection
multiprocessing/managers multiprocessing/pool multiprocessing/queues netrc ntpath numbers operator optparse os pdb pickle
pkgutil platform plistlib poplib posixpath pprint pyclbr pydoc queue random reprlib runpy sched selectors shelve shlex
shutil smtplib socket socketserver ssl statistics subprocess symtable tabnanny tarfile tempfile textwrap threading timeit
tokenize trace traceback tracemalloc types typing unittest/case unittest/loader unittest/main unittest/mock unittest/suite
urllib/error urllib/parse urllib/request urllib/robotparser uuid wave weakref webbrowser xml/dom/minidom
xml/etree/ElementTree xml/sax/saxutils zipapp zipimport zoneinfo/_zoneinfo
""".split()

# Every 20th module of the list, from the 10th on, is held out: about 5 % of the text, in whole files.
_HELD_OUT_EVERY = 20
_HELD_OUT_FROM = 10
# A file of the user's own is cut once: its last tenth is held out.
_HELD_OUT_SHARE = 0.1

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextError(ValueError):
    """A text that cannot be read or cannot be trained on; the message is one line for the user."""


@dataclass(frozen=True)
class Text:
    """A text in two parts that share no file (or, of one file, no character).

    Attributes:
        name: where it comes from, for the reader.
        training: what models are fitted to.
        held_out: what they are judged on.
    """

    name: str
    training: str
    held_out: str


def standard_library(folder: Path | None = None) -> Text:
    """Read the source of the running interpreter's standard library.

    Args:
        folder: where the library lies; the running interpreter's own by default.

    Raises:
        TextError: if either part comes out empty, as where only compiled modules are installed.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    parts: dict[bool, list[str]] = {False: [], True: []}
    for position, module in enumerate(STANDARD_LIBRARY):
        path = folder / f"{module}.py"
        if path.is_file():
            # tokenize.open honours the encoding cookie of a source file.
            with tokenize.open(path) as file:
                parts[position % _HELD_OUT_EVERY == _HELD_OUT_FROM].append(file.read())
    found = len(parts[False]) + len(parts[True])
    training, held_out = "".join(parts[False]), "".join(parts[True])
    if not training or not held_out:
        raise TextError(f"{folder} has no source of the standard library; name another text with --text")
    return Text(f"standard library, {found} of {len(STANDARD_LIBRARY)} modules", training, held_out)


def from_file(path: Path) -> Text:
    """Read a UTF-8 file; its last tenth is held out.

    Raises:
        TextError: if it is missing, unreadable, empty or not UTF-8.
    """
    try:
        # utf-8-sig drops a byte order mark; the default newline handling turns \\r\\n into \\n.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position {error.start}"
        ) from error
    if not text:
        raise TextError(f"{path} is empty")
    cut = len(text) - int(len(text) * _HELD_OUT_SHARE)
    return Text(str(path), text[:cut], text[cut:])


class Vocabulary:
    """The symbols of a text: its frequent characters, and one symbol for all others.

    Symbol 0 is the unknown one. A character is frequent if it occurs twice, and at least once in 100,000 characters:
    what is rarer cannot be learned and only makes the softmax wider.

    Raises:
        TextError: if no character is frequent, so that there is nothing to tell apart.
    """

    def __init__(self, text: str) -> None:
        least = max(2, len(text) // 100_000)
        frequent = sorted(character for character, count in Counter(text).items() if count >= least)
        self.symbols = [UNKNOWN, *(character for character in frequent if character != UNKNOWN)]
        if len(self.symbols) == 1:
            raise TextError("the text is too short: no character occurs twice")
        self._index = {character: index for index, character in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Tensor:
        """Return the symbols of a text as int64, (characters,)."""
        return torch.tensor([self._index.get(character, 0) for character in text], dtype=torch.int64)

    def decode(self, symbols: list[int]) -> str:
        """Return the text of a list of symbols."""
        return "".join(self.symbols[symbol] for symbol in symbols)


class Streams:
    """A text cut into B equally long streams that are read side by side, one segment after another.

    Stream b is a contiguous piece of the text, and its segments follow each other, so the state at the end of a segment is
    the right one for the start of the next. Targets are the inputs one character later; nothing is read twice in an epoch.

    Args:
        symbols: the text, (characters,) int64.
        batch: B, the number of streams.
        bptt: T, the length of a segment.
        ragged: keep a last segment shorter than T (evaluation); otherwise the remainder is dropped, so that all steps
            of a training have the same size.

    Raises:
        TextError: if the text is shorter than one batch.
    """

    def __init__(self, symbols: Tensor, batch: int, bptt: int, *, ragged: bool = False) -> None:
        least = batch * (1 if ragged else bptt) + 1
        if len(symbols) < least:
            raise TextError(
                f"the text is too short: one batch of {batch} × {bptt} takes {least} characters, {len(symbols)} are there; "
                "lower --batch or --bptt"
            )
        length = (len(symbols) - 1) // batch
        if not ragged:
            length -= length % bptt
        self.bptt = bptt
        self.characters = batch * length
        # (L, B): time first, as the recurrent layers want it, so that a segment is a slice.
        self._inputs = symbols[: batch * length].view(batch, length).t().contiguous()
        self._targets = symbols[1 : batch * length + 1].view(batch, length).t().contiguous()

    def __len__(self) -> int:
        """Segments in one epoch."""
        return -(-self._inputs.shape[0] // self.bptt)

    def segment(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Return the inputs (T, B), the targets (T, B) and whether the streams start here, so that states begin at zero.

        Steps beyond the last segment begin another epoch.
        """
        start = step % len(self) * self.bptt
        rows = slice(start, start + self.bptt)
        return self._inputs[rows], self._targets[rows], start == 0
