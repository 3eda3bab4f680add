"""The structure of a shell line: its commands with their words and redirections, parsed by tree-sitter's bash
grammar.

Takes text; gives plain values. Nothing is run or expanded: a word is known where only quoting has to be removed, and
unknown where it has a variable, a substitution or a pattern. Knows no program and no danger.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from longspec.cli.shell.quoting import continued, readable, substitutions, unescaped

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

__all__ = ["BEYOND_FISH", "Call", "Redirect", "Word", "calls", "functions", "joined", "kinds", "literal", "parse"]

_LONGEST = 10_000
"""Characters of a line that is read; a command that a person wants is a hundredth of it."""

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "v": "\v"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4}|U[0-9a-fA-F]{1,8}|[0-7]{1,3}|c.|.)", re.DOTALL)
_EXPANDS = {"simple_expansion", "expansion", "command_substitution", "process_substitution", "arithmetic_expansion"}
_SUBSTITUTES = {"command_substitution", "process_substitution"}

BEYOND_FISH = {
    "if_statement", "while_statement", "for_statement", "c_style_for_statement", "case_statement", "compound_statement",
    "function_definition", "subshell", "process_substitution", "heredoc_redirect", "herestring_redirect", "expansion",
    "variable_assignment", "test_command", "ansi_c_string", "translated_string", "arithmetic_expansion",
}  # fmt: skip
"""Kinds of node that fish writes otherwise or not at all."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word. text: the argument that the program gets, where `known`; else the source text."""

    text: str
    known: bool = True


@dataclass(frozen=True, slots=True)
class Redirect:
    """A redirection. operator: `>`, `>>`, `<`, `<<<` and so on. target: None for a closed descriptor; of a
    here-document its text.
    """

    operator: str
    target: Word | None


@dataclass(frozen=True, slots=True)
class Call:
    """One command. words is empty for redirections or assignments alone. fed: its input is a pipe.

    feeder: the commands before it in the pipeline. around: the redirections of groups that it stands in.
    """

    words: tuple[Word, ...] = ()
    redirects: tuple[Redirect, ...] = ()
    assigned: tuple[tuple[str, Word], ...] = ()
    fed: bool = False
    feeder: tuple[Call, ...] = ()
    around: tuple[Redirect, ...] = ()


@cache
def _parser() -> Parser:
    import tree_sitter_bash
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_bash.language()))


def parse(line: str) -> Node | None:
    """The syntax tree of a line; None where it is empty or has a syntax error."""
    if len(line) > _LONGEST or "\0" in line:
        return None
    root = _parser().parse(line.encode(errors="replace")).root_node
    if root.has_error or not any(child.type != "comment" for child in root.named_children):
        return None
    return root


def kinds(node: Node) -> set[str]:
    """The types of all nodes below this one."""
    found, rest = set(), [node]
    while rest:
        found.add((node := rest.pop()).type)
        rest += node.children
    return found


def functions(node: Node) -> set[str]:
    """The names of the functions defined below this node."""
    found, rest = set(), [node]
    while rest:
        node = rest.pop()
        if node.type == "function_definition" and (name := node.child_by_field_name("name")) is not None:
            found.add(_source(name))
        rest += node.children
    return found


def joined(text: str) -> str | None:
    """Several lines as one, where that is provably equivalent: both have the same tree, up to command separators."""
    if "\n" not in text:
        return text if parse(text) is not None else None
    root = parse(text)
    if root is None or "heredoc_redirect" in kinds(root):
        return None
    opened, begins, data, line = False, False, text.encode(), bytearray()
    leaves = _leaves(root)
    if any(b"\n" in _bytes(leaf).strip(b"\n") or (leaf.type == "comment") for leaf in leaves):
        return None
    ends = {leaf.end_byte: leaf for leaf in leaves if _bytes(leaf).strip()}
    for at, byte in enumerate(data):
        if at in ends:
            opened = ends[at].type in _OPENING
        if byte == ord("\n"):
            if line.endswith(b"\\"):
                line = bytearray(line[:-1].rstrip() + b" ")
            else:
                line += b" " if opened or not line.strip() else b"; "
                opened = True
            begins = True
        elif not (begins and byte in b" \t"):
            line.append(byte)
            begins = False
    one = line.decode().strip("; ")
    again = parse(one)
    if again is None or str(again) != str(root):
        return None
    return one if _said(again) == _said(root) else None


_OPENING = {"do", "then", "else", "{", "(", "|", "|&", "&&", "||", ";", ";;", "&", "in"}


def _leaves(node: Node) -> list[Node]:
    found, rest = [], [node]
    while rest:
        node = rest.pop()
        if node.children:
            rest += reversed(node.children)
        else:
            found.append(node)
    return found


def _said(node: Node) -> list[str]:
    """The texts of the leaves, without command separators."""
    return [text for leaf in _leaves(node) if (text := _source(leaf).strip()) not in ("", ";")]


def _bytes(node: Node) -> bytes:
    return node.text or b""


def calls(
    node: Node, fed: bool = False, feeder: tuple[Call, ...] = (), around: tuple[Redirect, ...] = ()
) -> Iterator[Call]:
    """Every command below a node, also inside substitutions and functions, in the order of the text.

    Raises:
        RecursionError: they are nested too deeply.
    """
    if node.type == "pipeline":
        before = feeder
        for child in node.named_children:
            found = list(calls(child, fed, before, around))
            yield from found
            fed, before = True, (*before, *found)
        return
    if node.type in _SUBSTITUTES:
        fed, feeder, around = _source(node).startswith(">("), (), ()
        if _source(node).startswith("`") and "\\" in _source(node):
            yield from _hidden(_source(node))
            return
    if node.type not in _COMMANDS:
        yield from _within(node) if not node.children else ()
        for child in node.children:
            yield from calls(child, fed, feeder, around)
        return
    body, redirecting = node, []
    if node.type == "redirected_statement":
        redirecting = [child for child in node.named_children if child.type.endswith("_redirect")]
        inside = [child for child in node.named_children if not child.type.endswith("_redirect")]
        body = inside[0] if inside else node
    call = _call(body, redirecting)
    if call is None:  # a loop or a group with redirections around it
        redirects, _ = _redirects(redirecting)
        call = Call(redirects=redirects, fed=fed, feeder=feeder)
        yield call
        yield from calls(body, fed, feeder, (*around, *redirects))
    else:
        call = replace(call, fed=fed, feeder=feeder, around=around)
        yield call
        for child in body.children if body is not node else ():
            yield from _within(child)
    for child in node.children:
        if child.id != body.id:
            yield from _within(child)
    for behind in (each for child in redirecting if child.type == "heredoc_redirect" for each in child.named_children):
        if behind.type == "pipeline":  # `cat <<E | sh`
            yield from calls(behind, True, (call,))
        elif not behind.type.startswith(("heredoc", "file_")):
            yield from calls(behind)


_COMMANDS = {
    "redirected_statement", "command", "declaration_command", "unset_command", "variable_assignment"
}  # fmt: skip


def _within(node: Node) -> Iterator[Call]:
    """The commands in the substitutions of a word."""
    if node.type in _SUBSTITUTES:
        yield from calls(node)
    elif node.type == "heredoc_redirect":
        yield from _hidden("" if _is_quoted(node) else _document(node)[0])
        for child in node.children:
            yield from _within(child) if not child.type.startswith("heredoc") else ()
    elif node.type in ("word", "regex", "extglob_pattern") and re.search(r"`|\$\(", _source(node)):
        yield from _hidden(_source(node))
    else:
        for child in node.children:
            yield from _within(child)


def _hidden(text: str) -> Iterator[Call]:
    """The commands in the substitutions of a text that the grammar takes for a plain one."""
    for code in substitutions(text):
        root = parse(readable(unescaped(continued(code))))
        if root is not None:
            yield from calls(root)
        elif code.strip():
            yield Call((Word(code, known=False),))


def _is_quoted(redirect: Node) -> bool:
    """Whether nothing is expanded in a here-document."""
    start = next((child for child in redirect.children if child.type == "heredoc_start"), None)
    return start is not None and bool(set(_source(start)) & set("'\"\\"))


def _call(node: Node, around: list[Node]) -> Call | None:
    words: list[Word] = []
    assigned: list[tuple[str, Word]] = []
    redirecting = list(around)
    if node.type in ("declaration_command", "unset_command"):
        words = [literal(child) if child.is_named else Word(_source(child)) for child in node.children]
        assigned += [_assignment(child) for child in node.children if child.type == "variable_assignment"]
    elif node.type == "variable_assignment":
        assigned.append(_assignment(node))
    elif node.type == "command":
        for child in node.named_children:
            if child.type == "variable_assignment":
                assigned.append(_assignment(child))
            elif child.type.endswith("_redirect"):
                redirecting.append(child)
            elif child.type != "comment":
                words.append(literal(child.named_children[0] if child.type == "command_name" else child))
    elif node.type != "redirected_statement":
        return None
    redirects, rest = _redirects(redirecting)
    return Call((*words, *rest), redirects, tuple(assigned))


def _redirects(nodes: Sequence[Node]) -> tuple[tuple[Redirect, ...], list[Word]]:
    """The redirections, and the words after a file's name, which the grammar assigns to the redirection: `> file
    command`.
    """
    found, rest = [], []
    for node in nodes:
        operator = next((_source(child) for child in node.children if not child.is_named), "<<")
        if node.type == "heredoc_redirect":
            text, behind = _document(node)
            text = re.sub(r"^\t+", "", text, flags=re.MULTILINE) if operator == "<<-" else text
            more, words = _redirects([child for child in behind if child.type == "file_redirect"])
            found += [Redirect(operator, Word(text, _is_quoted(node) or not _EXPANDED.search(text))), *more]
            rest += [literal(child) for child in behind if child.type in _ARGUMENTS] + words
            continue
        targets = [literal(child) for child in node.named_children if child.type != "file_descriptor"]
        found.append(Redirect(operator, targets[0] if targets else None))
        rest += targets[1:]
    return tuple(found), rest


def _document(node: Node) -> tuple[str, list[Node]]:
    """A here-document's text, and what stands behind its start."""
    body = next((_source(child) for child in node.children if child.type == "heredoc_body"), "")
    return body, [child for child in node.named_children if not child.type.startswith("heredoc_")]


_EXPANDED = re.compile(r"(?<!\\)[$`]")
_ARGUMENTS = {"word", "string", "raw_string", "concatenation", "number", "simple_expansion", "expansion"}


def _assignment(node: Node) -> tuple[str, Word]:
    name, value = node.child_by_field_name("name"), node.child_by_field_name("value")
    return _source(name) if name else "", literal(value) if value else Word("")


def literal(node: Node) -> Word:
    """A word, with its quotes removed where nothing in it is expanded."""
    source = _source(node)
    match node.type:
        case "word" | "number" | "variable_name" | "regex" | "extglob_pattern" | "test_operator":
            text = re.sub(r"\\(.)", r"\1", source.replace("\\\n", ""), flags=re.DOTALL)
            bare = re.sub(r"\\.", "", source, flags=re.DOTALL)
            return Word(text if not set(bare) & set("*?[") else source, not set(bare) & set("*?["))
        case "raw_string":
            return Word(source[1:-1])
        case "string":
            if kinds(node) & _EXPANDS:
                return Word(source, known=False)
            return Word(re.sub(r'\\([$`"\\\n])', lambda m: m[1].strip("\n"), source[1:-1]))
        case "ansi_c_string":
            return Word(_ESCAPE.sub(_unescape, source[2:-1]))
        case "concatenation":
            # `{}` (two nodes) is a placeholder of find and xargs; other braces expand to several words.
            if source != "{}" and any(_source(c) == "{" for c in node.children):
                return Word(source, known=False)
            parts = [literal(child) for child in node.children]
            return Word("".join(part.text for part in parts), all(part.known for part in parts))
    return Word(source, known=not node.is_named)


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "xuU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else ""
    if code[0] in "01234567":
        return chr(int(code, 8) & 255)
    if code[0] == "c":
        return chr(ord(code[1]) & 31) if len(code) > 1 else ""
    return _ESCAPES.get(code, code)


def _source(node: Node) -> str:
    return _bytes(node).decode(errors="replace")
