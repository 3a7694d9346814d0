"""Fonts for the texts in pictures: names of classes and files can be in any script."""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from PIL import ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, str]


def prepare(figure: "Figure") -> "Figure":
    """Returns a figure whose texts are drawn literally, in fonts that have their characters.

    By default Matplotlib reads what is between two `$` as mathematics. Labels that it writes itself
    are empty until it draws, such as the powers of ten on a logarithmic axis, and stay mathematics.
    """
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font
    from matplotlib.text import Text

    texts = [artist for artist in figure.findobj(Text) if artist.get_text()]
    others = font_files("".join(text.get_text() for text in texts))[1:]
    for file in others:
        fontManager.addfont(file)
    families = [FT2Font(file).family_name for file in others]
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily([*text.get_fontfamily(), *families])
    return figure


def for_captions(captions: Sequence[str], size: int) -> Callable[[str], list[Run]]:
    """Returns a function that splits a caption into runs, each with a font for its characters."""
    default = ImageFont.load_default(size)
    text = "".join(captions)
    if text.isascii():  # without importing Matplotlib
        return lambda caption: [(default, caption)]
    files = font_files(text)
    fonts = {file: ImageFont.truetype(file, size) for file in files}
    missing = {file: _missing(file, set(text)) for file in files}

    def font_of(character: str) -> str:
        return next((file for file in files if character not in missing[file]), files[0])

    def runs_of(caption: str) -> list[Run]:
        if caption.isascii():
            return [(default, caption)]
        return [(fonts[file], "".join(run)) for file, run in itertools.groupby(caption, font_of)]

    return runs_of


def font_files(text: str) -> list[str]:
    """Returns files of fonts that together have the characters of a text, Matplotlib's own first.

    If no installed font has some of them, pictures show boxes; it says so once.
    """
    from matplotlib.font_manager import FontProperties, findfont

    files = [str(findfont(FontProperties()))]
    missing = _missing(files[0], text.replace("\n", ""))
    while missing:
        left = {file: _missing(file, missing) for file in _installed()}
        file = min(
            left, key=lambda file: (len(left[file]), "Regular" not in file, file), default=""
        )
        if not file or len(left[file]) == len(missing):
            _say_once("".join(sorted(missing)))
            break
        files.append(file)
        missing = left[file]
    return files


@functools.cache
def _installed() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    # macOS's LastResort has a box for every character.
    return [file for file in findSystemFonts() if "LastResort" not in file]


def _missing(file: str, characters: Collection[str]) -> set[str]:
    """Returns the characters that a font does not have."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):  # damaged
        return set(characters)
    if not font.scalable:  # bitmaps of one size, such as color emoji
        return set(characters)
    return {c for c in characters if not font.get_char_index(ord(c))}


_said: list[str] = []


def _say_once(characters: str) -> None:
    if not _said:
        _said.append(characters)
        print(
            f"pictures show boxes instead of {characters[:20]!r}: no installed font has these "
            "characters; install one, for example Noto Sans CJK for Chinese, Japanese and Korean",
            file=sys.stderr,
        )
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # Matplotlib's, one per character
