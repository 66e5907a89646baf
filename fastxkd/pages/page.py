"""A template of this folder as one page that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import numpy as np

from fastxkd._extras import require
from fastxkd.cam import render
from fastxkd.pages.numbers import count, number, percent, score, seconds

# All the page works without it, so its two controls stay hidden until it runs.
SCRIPT = """
const root = document.documentElement;
for (const control of document.querySelectorAll("[data-control]")) control.hidden = false;
const strength = document.querySelector("[data-control=strength] input");
if (strength) strength.oninput = () => root.style.setProperty("--heat", strength.value / 100);
document.querySelector("[data-control=theme]").onclick = () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
"""


def render_page(template: str, *, extra: str = "report", **values: Any) -> str:
    """The page as text; names and other words in ``values`` are escaped.

    Args:
        template: a file ``*.html.j2`` beside this one, which includes ``report.css.j2``.
        extra: what to install where jinja2 is missing.
        values: what the template asks for beside its script and colours, which it gets here.

    Raises:
        ImportError: jinja2 is missing.
    """
    jinja2 = require("jinja2", extra=extra)
    markup = require("markupsafe", extra=extra).Markup
    folder = resources.files("fastxkd.pages")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        percent=percent, number=number, count=count, seconds=seconds, score=score
    )
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    page: str = environment.get_template(template).render(
        legend=markup(_legend()),
        opacity=render.OPACITY,
        script=markup(SCRIPT),
        script_hash="sha256-" + base64.b64encode(digest).decode("ascii"),
        **values,
    )
    return page


def _legend() -> str:
    table = render.colors()[np.linspace(0, 255, 17).round().astype(int)]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in table.tolist())
