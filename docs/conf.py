"""The site of the documentation, which fetches nothing while it is built.

python -m sphinx -W --keep-going -n -b html docs OUT
"""

import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import sys

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes

import wavg_jax

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = os.environ.get("READTHEDOCS_GIT_CLONE_URL", "").removesuffix(".git")
"""The address of the repository, where it is known."""
COMMIT = os.environ.get("READTHEDOCS_GIT_COMMIT_HASH", "main")

project = "wavg_jax"
author = "the authors of wavg_jax"
copyright = "the authors of wavg_jax. Apache-2.0"
version = release = wavg_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_title = "wavg_jax"
html_theme_options = {
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
    "repository_url": REPOSITORY,
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3  # as GitHub makes them
nb_execution_mode = "off"  # tests run the notebooks, which are committed without outputs

# What annotations of fields name, which has no page here.
nitpick_ignore_regex = [("py:class", r"(collections|jax|numpy|wavg_jax\.rounds\.policy)\..*")]
default_role = "literal"  # single backticks are code in docstrings
autodoc_typehints = "none"  # evaluated, they are unions of JAX's internals; docstrings give shapes and units
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
copybutton_prompt_text = ">>> "

# README is a page through `index.md`; other files of the repository are pages through symbolic links in this folder.
INCLUDED = {ROOT / "README.md": "index"}


def give_public_homes():
    """Names modules and objects as users import them, so that references find them."""
    names = ["reporting", *(name for name in wavg_jax.__all__ if inspect.ismodule(getattr(wavg_jax, name)))]
    for module in (*(f"wavg_jax.{name}" for name in names), "wavg_jax"):
        here = pkgutil.resolve_name(module)
        sys.modules[module] = here
        for value in (getattr(here, name) for name in here.__all__):
            if inspect.isclass(value) or inspect.isfunction(value):
                value.__module__ = module


def escape(line):
    """Escapes what is no markup in docstrings: |v| and [K, *shape]."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = line.split("`")
    parts[::2] = (re.sub(r"\||(?<!\w)\*(?=[\w.]+\])", r"\\\g<0>", part) for part in parts[::2])
    return "`".join(parts)


def keep_blocks(app, what, name, obj, options, lines):
    """Turns docstrings' indented blocks, which hold formulas and tables, into literal blocks."""
    sections = (i for i, line in enumerate(lines) if re.match(r"(Args|Attributes|Returns|Raises):$", line))
    end = next(sections, len(lines))
    kept, inside = [], False
    for line in lines[:end]:
        begins = line.startswith("    ") and not inside and not (kept and kept[-1])
        kept += ["::", ""] if begins else []
        inside = begins or (inside and (line.startswith("    ") or not line))
        kept.append(line if inside else escape(line))
    lines[:] = [*kept, *map(escape, lines[end:])]


def find_pages(app, env, docnames):
    """Lets links to a file of the repository find its page, wherever that is on the site.

    Sphinx knows pages by their path in its own folder alone, and follows symbolic links before it looks there.
    """
    known = app.project._path_to_docname
    known.update({app.project.doc2path(name, absolute=True).resolve(): name for name in app.project.docnames})
    known.update(INCLUDED)


def move_links(text, folder):
    """Makes a text's relative links and pictures start from that folder."""
    return re.sub(r'(\]\(|src=")(?!\w+:|#)', rf"\g<1>{pathlib.Path(folder).as_posix()}/", text)


def move_included(app, path, parent, text):
    without_badges = re.sub(r"^\[!\[.*\n", "", text[0], flags=re.MULTILINE)  # of pictures from elsewhere
    text[0] = move_links(without_badges, path.parent)


def move_linked(app, page, text):
    """Links of a page that is a symbolic link start from the folder of the file."""
    path = app.env.doc2path(page)
    if path.is_symlink():
        text[0] = move_links(text[0], os.path.relpath(path.resolve().parent, path.parent))


def link_files(app, doctree):
    """Links files and folders that are no pages in the repository, where its address is known; elsewhere files are
    copied, and folders are just named."""
    for node in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        if node["reftype"] != "myst" or node.get("refdomain"):
            continue
        path = pathlib.Path(app.env.relfn2path(node["reftarget"], node["refdoc"])[1])
        if REPOSITORY and path.exists():
            address = f"{REPOSITORY}/blob/{COMMIT}/{path.relative_to(ROOT)}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=address))
        elif path.is_dir():
            node.replace_self(node.children)


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out fields, of which the section Attributes of their class speaks, and what scikit-learn adds."""
    function = callable(obj) or isinstance(obj, property)
    return skip or (what == "class" and (not function or name.startswith("set_")))


def resolve(app, env, node, content):
    """Finds a public name that is written without its module."""
    if node.get("refdomain") == "py":
        target = f"wavg_jax.{node['reftarget']}"
        return env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], target, node, content
        )
    return None


def draw_formula(translator, node):
    """Writes a formula as MathML, which browsers draw without a script from elsewhere."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app):
    importlib.import_module("wavg_jax.reporting")
    give_public_homes()
    app.add_html_math_renderer("mathml", (draw_formula, None), (draw_formula, None))
    app.connect("autodoc-process-docstring", keep_blocks, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("env-before-read-docs", find_pages)
    app.connect("source-read", move_linked)
    app.connect("include-read", move_included)
    app.connect("doctree-read", link_files)
    app.connect("missing-reference", resolve)
