r"""Equations as MathML, which browsers show by themselves: no script, no font and no network is needed.

`latex2mathml` translates them when the pages are built. What it leaves to do is TeX's spacing: a thin space around names of
functions, as in :math:`u \log p`, none after a minus that is a sign, and braces as wide as what they stand under.
"""

from html import unescape
from xml.etree.ElementTree import Element, tostring

from docutils import nodes
from latex2mathml.converter import convert_to_element
from sphinx.application import Sphinx
from sphinx.util import logging

SIGNS = ("+", "\u2212", "\u00b1")
ENDS = (")", "]", "}", "|", "\u2016", "\u2225", "!", "\u2032", "*")  # a sign after one of these is an operation
BARS = ("|", "\u2016")
BRACES = ("\u23de", "\u23df")


def mathml(tex: str, *, block: bool) -> str:
    r"""Return an equation in LaTeX as MathML.

    Args:
        tex: the equation, without dollars.
        block: True if it is a paragraph of its own, False within a line.

    Raises:
        ValueError: if it is not LaTeX, or has a command or an environment that is not known.

    Example:
        >>> mathml("x", block=False)
        '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><mi>x</mi></mrow></math>'
    """
    try:
        root = convert_to_element(tex, display="block" if block else "inline")
    except Exception as error:  # its errors share no class
        raise ValueError(f"{type(error).__name__} in the equation {tex}") from error
    for node in root.iter():
        node.text = node.text and unescape(node.text)
        if node.text and node.tag != "mtext" and node.text[0] in "\\&":
            raise ValueError(f"{node.text} is not known, in the equation {tex}")
        if node.tag == "mo" and node.text == "\u221e":
            node.tag = "mi"  # infinity is a number
        elif node.tag == "mo" and node.text in BARS:
            node.attrib |= {"lspace": "0", "rspace": "0"}
    for parent in list(root.iter()):
        _set_spaces(parent)
    return tostring(root, encoding="unicode")


def _set_spaces(parent: Element) -> None:
    """Set the spaces between the parts of a row."""
    parts = list(parent)
    if parent.tag in ("munder", "mover") and parts[-1].text in BRACES:
        parts[-1].set("stretchy", "true")
    if parent.tag == "mover" and parent.get("accent") and parts[0].tag == "mi":
        parts[-1].set("stretchy", "false")  # a hat over one letter
    if parent.tag not in ("mrow", "mstyle", "math"):
        return
    for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
        if part.tag == "mo" and part.text in SIGNS and before is not None and before.tag == "mo" and before.text not in ENDS:
            part.set("form", "prefix")
        if _is_function(part):
            if before is not None and before.tag != "mo":
                parent.insert(list(parent).index(part), Element("mspace", width="0.167em"))
            if after is not None and after.tag != "mo":
                parent.insert(list(parent).index(part) + 1, Element("mspace", width="0.167em"))


def _is_function(part: Element) -> bool:
    """Return True for the name of a function, such as log, with or without indices."""
    name = part[0] if part.tag in ("msub", "msup", "msubsup") else part
    return name.tag == "mi" and len(name.text or "") > 1


def _write(writer, node) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        shown = mathml(node.astext(), block=block)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
        shown = writer.encode(node.astext())
    writer.body.append(f'<div class="math-block">{shown}</div>\n' if block else shown)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer of equations under the name "mathml"."""
    app.add_html_math_renderer("mathml", (_write, None), (_write, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
