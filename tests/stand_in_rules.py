"""What the stand-in server knows of requests and answers, without any state.

The word rule, by which every cell that should come out is known beforehand:

    A label applies to a text if the text contains, upper or lower case alike, the first five letters of
    any word of four letters or more in the label's name. "praising_violence": "prais" or "viole".

A count of tokens of its own, what OpenAI would say against a request, and how an answer can be spoilt.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def label_stems(label: str) -> tuple[str, ...]:
    return tuple(word[:5] for word in re.findall(r"[a-z]+", label.casefold()) if len(word) >= 4)


def labels_of(text: str, labels: list[str]) -> list[str]:
    """The labels that apply to a text, by the word rule."""
    folded = text.casefold()
    return [label for label in labels if any(stem in folded for stem in label_stems(label))]


# About OpenAI's pieces: a word with the blank before it, in nines of letters; digits by three, signs by three.
PIECES = re.compile(r"[ _]?[A-Za-z]{1,9}|\d{1,3}| ?[^\W\d_a-zA-Z]{1,2}| ?[^\w\s]{1,3}|_|\s+")


def count_tokens(text: str) -> int:
    """Tokens by a rule of this server's own, which for English is within a fifth of OpenAI's (token_counts.json)."""
    return len(PIECES.findall(text))


def prompt_tokens(body: dict[str, Any]) -> int:
    """What is billed as input: the messages, what is around them, and the schema."""
    messages = sum(count_tokens(message["content"]) for message in body["messages"])
    form = body.get("response_format", {})
    schema = json.dumps(form["json_schema"]["schema"], separators=(",", ":")) if "json_schema" in form else ""
    return 11 + messages + count_tokens(schema)


# Reading a request


def user_part(body: dict[str, Any]) -> str:
    """The rows' part of a request, which may stand behind the instructions in one message."""
    return str(body["messages"][-1]["content"]).rpartition("\n\n")[2]


def given_rows(body: dict[str, Any]) -> dict[str, str]:
    """The texts of a request, by their ids: as enrich_dataset sends them, or as a list of objects."""
    message = json.loads(user_part(body))
    if isinstance(message.get("texts"), list):
        return {row["id"]: row["text"] for row in message["texts"]}
    return {row: given if isinstance(given, str) else given[0] for row, given in message.items()}


def answer_schema(body: dict[str, Any]) -> dict[str, Any]:
    """The schema of one row's answer, or {}."""
    form = body.get("response_format", {})
    schema = form["json_schema"]["schema"] if form.get("type") == "json_schema" else {}
    return (
        dict(schema["$defs"]["a"] if "$defs" in schema else next(iter(schema["properties"].values()))) if schema else {}
    )


def asked_form(body: dict[str, Any]) -> str:
    """The answer's form: "list", "each" or "one", from the schema, or without one from the system message."""
    kind = answer_schema(body).get("type")
    if kind:
        return {"array": "list", "object": "each", "string": "one"}[kind]
    message = body["messages"][0]["content"]
    return "one" if "which one label" in message else "each" if "and 1 if it applies" in message else "list"


def asked_labels(body: dict[str, Any]) -> list[str]:
    """The labels of a request, from its schema, or without one from the system message."""
    schema = answer_schema(body)
    if schema:
        return list(schema.get("enum") or schema.get("properties") or schema["items"]["enum"])
    return [
        json.loads(name)
        for name in re.findall(r'^(?:- )?(".*?[^\\]")(?::|$)', body["messages"][0]["content"], re.MULTILINE)
    ]


# Writing an answer


def in_form(answer: dict[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
    """Where one label is asked for, it is the first that applies, or the last of all."""
    form, labels = asked_form(body), asked_labels(body)
    if form == "each":
        return {row: {label: int(label in applying) for label in labels} for row, applying in answer.items()}
    if form == "one":
        return {row: next(iter(applying), labels[-1]) for row, applying in answer.items()}
    return dict(answer)


def spoil(answer: dict[str, Any], fault: str) -> str:
    """The answer's JSON, with a fault of content in it."""
    ids = list(answer)
    victim = ids[len(ids) // 2]
    if fault == "garbage":
        return "I think that none of these are a problem."
    if fault == "doubled":
        return json.dumps(answer)[:-1] + f', "{victim}": []}}'
    if fault == "missing":
        del answer[victim]
    if fault == "strange-ids":
        answer = {str(number): given for number, given in enumerate(answer.values(), 1)}
    if fault == "foreign":
        answer = {("7" if row == victim else row): labels for row, labels in answer.items()}
    if fault == "unknown":
        answer[victim] = ["no_such_label"] if isinstance(answer[victim], list) else "no_such_label"
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def dense_form(answer: dict[str, list[str]], labels: list[str]) -> str:
    """The answer's JSON in the long form, with a 0 or 1 for each label."""
    dense = {row: {label: int(label in applying) for label in labels} for row, applying in answer.items()}
    return json.dumps(dense, separators=(",", ":"), ensure_ascii=False)


# What OpenAI says against a request


def error_body(
    message: str, kind: str = "invalid_request_error", param: Any = None, code: Any = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unsupported(param: str) -> dict[str, Any]:
    """How OpenAI refuses a parameter."""
    message = f"Unsupported parameter: '{param}' is not supported with this model."
    if param == "reasoning_effort":
        message = (
            "Unsupported value: 'reasoning_effort' does not support 'none' with this model. "
            "Supported values are: 'minimal', 'low', 'medium', and 'high'."
        )
    return error_body(message, param=param, code="unsupported_parameter")


def refused_part(body: dict[str, Any], refuses: set[str]) -> str:
    """The first part of a request that a server is set to refuse, or ""."""
    form = body.get("response_format", {"type": "text"})
    found = {name for name in body if name in refuses} | ({form["type"]} & refuses)
    if "maxItems" in refuses and "maxItems" in json.dumps(form):
        found.add("maxItems")
    if body.get("reasoning_effort") not in {"none", None}:
        found.discard("reasoning_effort")
    if "temperature" in body and body.get("reasoning_effort") not in {"none", None}:
        found.add("temperature")
    return min(found, default="")


SCHEMA_KEYWORDS = {"type", "properties", "required", "additionalProperties", "$defs", "items", "enum", "maxItems"}


def check_schema(schema: Any, path: str = "") -> str:
    """What OpenAI would say against a strict schema, or ""."""
    root = schema
    enums: list[Any] = []
    properties = 0

    def walk(node: Any, place: str) -> str:
        nonlocal properties
        if "$ref" in node:
            return "" if node["$ref"].removeprefix("#/$defs/") in root.get("$defs", {}) else f"{place}: bad $ref"
        unknown = set(node) - SCHEMA_KEYWORDS
        if unknown:
            return f"In context={place}, '{unknown.pop()}' is not permitted."
        enums.extend(node.get("enum", ()))
        if node.get("type") == "object":
            names = node.get("properties", {})
            properties += len(names)
            if node.get("additionalProperties") is not False:
                return f"In context={place}, 'additionalProperties' is required to be supplied and to be false."
            if sorted(node.get("required", [])) != sorted(names):
                return f"In context={place}, 'required' is required to be an array including every key in properties."
        children = [*node.get("properties", {}).items(), *node.get("$defs", {}).items()]
        children += [("items", node["items"])] if "items" in node else []
        return next(filter(None, (walk(child, f"{place}/{name}") for name, child in children)), "")

    if schema.get("type") != "object":
        return "schema must be a JSON Schema of 'type: \"object\"'"
    return walk(schema, path) or (
        "too many enum values" if len(enums) > 1000 else "too many properties" if properties > 5000 else ""
    )


PARAMETERS = {
    "model", "messages", "response_format", "temperature", "reasoning_effort", "max_completion_tokens", "max_tokens",
    "stream", "seed", "service_tier",
}  # fmt: skip


def check_body(body: Any) -> dict[str, Any] | None:
    """The 400 that OpenAI would give to a request, or None."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body.get("messages"):
        return error_body("you must provide a model and messages")
    if set(body) - PARAMETERS:
        return error_body(f"Unrecognized request argument supplied: {min(set(body) - PARAMETERS)}")
    form = body.get("response_format", {"type": "text"})
    if form["type"] == "json_object" and "json" not in json.dumps(body["messages"]).lower():
        return error_body("'messages' must contain the word 'json' in some form, to use 'response_format'.")
    if form["type"] == "json_schema":
        given = form["json_schema"]
        complaint = "" if re.fullmatch(r"[\w-]{1,64}", given.get("name", "")) else "bad name"
        complaint = complaint or check_schema(given["schema"])
        if complaint:
            name = given.get("name")
            return error_body(f"Invalid schema for response_format '{name}': {complaint}", param="response_format")
    return None
