"""Makes the C reference from the header: comments become prose, declarations code. A page asks for it with
``<!-- header: path -->``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIRECTIVE = re.compile(r"<!-- header: (\S+) -->")
COMMENT = re.compile(r"^/\*(.*?)\*/[ ]*$", flags=re.DOTALL | re.MULTILINE)  # one that begins a line


def on_page_markdown(markdown: str, **_) -> str:
    return DIRECTIVE.sub(lambda match: header_page((ROOT / match[1]).read_text()), markdown)


def header_page(header: str) -> str:
    parts, at = [], 0
    for comment in COMMENT.finditer(header):
        parts += [_code(header[at : comment.start()]), _prose(comment[1])]
        at = comment.end()
    parts.append(_code(header[at:]))
    return "\n\n".join(part for part in parts if part)


def _code(text: str) -> str:
    plumbing = r"^#(ifndef|endif|if|else|elif|include|define LOCALATTN_(LOCALATTN_H|API)\b).*$|^extern \"C\" \{$|^\}$"
    text = re.sub(plumbing, "", text, flags=re.MULTILINE).replace("LOCALATTN_API ", "")
    text = re.sub(r"\n{2,}", "\n\n", text).strip()
    return f"```c\n{text}\n```" if text else ""


def _prose(comment: str) -> str:
    text = "\n".join(re.sub(r"^ \* ?", "", line).strip("\n").rstrip() for line in comment.splitlines()).strip()
    text = re.sub(r"^(.+)\n-{3,}$", r"## \1\n", text, flags=re.MULTILINE)
    return "\n\n".join(_paragraph(paragraph) for paragraph in re.split(r"\n{2,}", text))


def _paragraph(text: str) -> str:
    laid_out = any(line.startswith("  ") for line in text.splitlines()) and not text.startswith("- ")
    return f"```text\n{text}\n```" if laid_out else text
