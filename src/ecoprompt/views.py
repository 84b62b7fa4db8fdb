"""Views of a text for a gate: what it says once it is folded, and the parts of it that are judged one by one."""

from __future__ import annotations

import re
import unicodedata

LOOK_ALIKES = str.maketrans(
    "аɑсԁеһіјӏкмоԛрѕтᴜԝхуѵвнгօսոհցαβεικνορτυχγωηϲյıАВСЕНІЈКМОРЅТХУΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"
    "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴠᴡʏᴢɡɩʋҽԍҏɓɖɗƒɠɦɨʝƙɭɱɳɵƥɽʂƭʈʉʌɯʐƶȥøłđħŧƀƈɛѡь",
    "aacdehijlkmoqpstuwxyvbhrounhgabeiknoptuxywncjiABCEHIJKMOPSTXYABEZHIKMNOPTYX"
    "abcdefghijklmnoprstvwyzgiuegpbddfghijklmnoprsttuvmzzzoldhtbcewb",
)
"""Letters of other scripts (Cyrillic, Armenian, Greek, phonetic) that are drawn like Latin ones."""
UNSEEN = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and signs that show nothing."""
APART = re.compile(r"(?<![^\W_])[^\W_](?:[ .\-_*·|/,]{1,4}[^\W_](?![^\W_])){5,}")
"""At least six letters that stand apart; between words there is more room than between letters."""
SENTENCE = re.compile(r"(?<=[.?!…。？！])[\"'”’)\]]*\s+|(?<=[:;])\s+")
SHORTEST = 4
"""Words of a part that is judged on its own; a shorter one goes with the next."""


def visible(text: str) -> str:
    """`text` as a reader sees it: nothing without width, no accents, look-alikes folded, letters apart put together."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        kept = (x for x in decomposed if unicodedata.category(x) not in ("Mn", "Me", "Cf") and x not in UNSEEN)
        text = "".join(kept).translate(LOOK_ALIKES)
    return APART.sub(_together, text)


def _together(match: re.Match[str]) -> str:
    return " ".join(re.sub(r"[\W_]", "", word) for word in re.split(r"\s{2,}|_{2,}", match[0]))


def normalise(text: str) -> str:
    """`text` as words of folded letters and digits with single spaces between."""
    return " ".join(re.findall(r"[^\W_]+", visible(text.casefold()).casefold()))


def parts(text: str) -> list[str]:
    """`text` as it is seen, and where it has several of them its sentences, questions and lines, one by one."""
    whole = visible(text)
    found: list[str] = []
    for part in (part for line in whole.split("\n") for part in SENTENCE.split(line)):
        if part.strip():
            if found and len(found[-1].split()) < SHORTEST:
                found[-1] += f" {part}"
            else:
                found.append(part)
    if len(found) > 1 and len(found[-1].split()) < SHORTEST:
        found[-2:] = [f"{found[-2]} {found[-1]}"]
    return list(dict.fromkeys([whole, *found])) if len(found) > 1 else [whole]


def word_windows(text: str, size: int) -> list[str]:
    """The normalised words of `text` in windows of `size` that overlap by half and end with the text; maybe none."""
    words = normalise(text).split()
    if len(words) <= size:
        return [" ".join(words)] if words else []
    last = len(words) - size
    starts = [*range(0, last, size - size // 2), last]
    return [" ".join(words[start : start + size]) for start in starts]
