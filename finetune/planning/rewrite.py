"""Changing keys in a recipe's text without touching anything else, comments included."""

from __future__ import annotations

import re
from typing import Any

import yaml


def scalar(value: Any) -> str:
    """A value on one line of YAML: true · adamw_8bit · [0.9, 0.95]."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def diff(keys: dict[str, tuple[Any, Any]]) -> list[str]:
    """Lines of a unified diff for keys (`section.key`) that changed from old to new, grouped by section."""
    lines: list[str] = []
    section = None
    for key, (old, new) in sorted(keys.items(), key=lambda item: item[0].split(".")[:-1]):
        above, _, leaf = key.rpartition(".")
        if above != section:
            section = above
            lines += [f" {above}:"] if above else []
        indent = "  " if above else ""
        lines += [f"-{indent}{leaf}: {scalar(old)}", f"+{indent}{leaf}: {scalar(new)}"]
    return lines


def rewrite(text: str, keys: dict[str, Any]) -> tuple[str, bool]:
    """(the YAML `text` with keys (`section.key` or `key`) set, whether its comments and layout were kept)."""
    content = yaml.safe_load(text)
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        node = content
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[leaf] = value
    lines = text.splitlines()
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        if "." not in section:
            _set(lines, section, leaf, value)
    patched = "\n".join(lines) + "\n"
    try:
        if yaml.safe_load(patched) == content:
            return patched, True
    except yaml.YAMLError:
        pass
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), False


def _set(lines: list[str], section: str, leaf: str, value: Any) -> None:
    """Set the key in a recipe written line by line; the caller must check the result."""
    if not section:
        first, last, indent = 0, len(lines), ""
    else:
        head = next((n for n, line in enumerate(lines) if re.match(rf"{re.escape(section)}:\s*(#.*)?$", line)), None)
        if head is None:
            lines += [f"{section}:", f"  {leaf}: {scalar(value)}"]
            return
        first = head + 1
        last = next((n for n in range(first, len(lines)) if re.match(r"[^\s#]", lines[n])), len(lines))
        indents = [match[0] for line in lines[first:last] if (match := re.match(r" +(?=[^\s#])", line))]
        indent = indents[0] if indents else "  "
    for n in range(first, last):
        if match := re.match(rf"{indent}{re.escape(leaf)}:[^#]*?(\s+#.*)?$", lines[n]):
            lines[n] = f"{indent}{leaf}: {scalar(value)}{match[1] or ''}"
            return
    end = last
    while end > first and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1  # after the section's last key, before comments of the next section
    lines.insert(end, f"{indent}{leaf}: {scalar(value)}")
