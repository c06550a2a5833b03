"""What Sphinx needs to be told about this library's API pages."""

import pkgutil
import re
from pathlib import Path
from typing import Any, TypeVar

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring


def skip_alias(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out "Alias for field number 0": the docstring of a NamedTuple names its fields."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def whole_description(docstring: GoogleDocstring) -> tuple[str, list[str]]:
    """A variable's docstring as it stands: napoleon would read "Betas: one a step" as a type."""
    lines = docstring._dedent(docstring._consume_to_end())
    return "", GoogleDocstring(lines, docstring._config).lines()


def find_home(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """Link a name as its reader knows it, such as ``md.ddim``, to the module that defines it.

    A name that exists but has no page here (``torch.Tensor``, a type variable, a private class)
    stays plain text: links to other projects would need the network. A name that does not exist is
    a warning, so the strict build catches it.
    """
    if node.get("refdomain") != "py":
        return None
    target = re.sub(r"^md\.", "minidiff.", node["reftarget"])
    for name in (target, f"{node.get('py:module')}.{target}"):  # as code in that module reads it
        try:
            found = pkgutil.resolve_name(name)
        except (AttributeError, ImportError, ValueError):
            continue
        module = getattr(found, "__module__", None) or ""
        qualified = getattr(found, "__qualname__", "")
        private = qualified.rpartition(".")[2].startswith("_")
        if isinstance(found, TypeVar) or private or not module.startswith("minidiff"):
            return text
        link = env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], f"{module}.{qualified}", node, text
        )
        return link if link is not None else text  # what is there only for the library has no page
    return None


LEDGER = Path(__file__).parents[1] / "equations.md"


def equations_of(name: str) -> list[str]:
    """The labels of the book's equations that this function or class computes."""
    rows = re.findall(r"^\| \{eq\}`(.+?)` \| \{py:\w+\}`(.+?)` \|", LEDGER.read_text(), re.MULTILINE)
    return [label for label, computed_by in rows if computed_by == name]


def name_equations(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Add to a docstring which equations of the book it stands behind."""
    if labels := equations_of(name):
        links = ", ".join(f":eq:`{label}`" for label in labels)
        lines += ["", f"In the book: {links}.", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx when it loads the extension."""
    app.connect("autodoc-skip-member", skip_alias)
    app.connect("missing-reference", find_home)
    app.connect("autodoc-process-docstring", name_equations)
    GoogleDocstring._consume_inline_attribute = whole_description  # no setting turns this off
    return {"parallel_read_safe": True, "parallel_write_safe": True}
