"""The page at ``/``: one HTML text with its style and scripts inside, and the policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import NamedTuple

STYLE = '<link rel="stylesheet" href="page.css">'
SCRIPTS = ("stream.js", "tree.js", "page.js")


class Page(NamedTuple):
    """What a response to ``GET /`` holds: the body, and the value of its Content-Security-Policy header."""

    html: str
    policy: str


def page() -> Page:
    """The page as served. The browser runs this script and style, known by their hashes, and asks this server only."""
    style, script = _read("page.css"), "".join(_read(name) for name in SCRIPTS)
    html = _read("page.html").replace(STYLE, f"<style>{style}</style>")
    for name in SCRIPTS:
        html = html.replace(f'<script type="module" src="{name}"></script>\n', "")
    html = html.replace("</body>", f'<script type="module">{script}</script>\n</body>')
    rules = (
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return Page(html, "; ".join(rules))


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
