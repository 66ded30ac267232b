"""Renders public chat templates with transformers: python public_templates.py FOLDER OUT

The templates come from llama.cpp (models/templates), which is part of the sdist of llama-cpp-python on PyPI. FOLDER caches
the download. The script writes JSON to OUT:
{"conversations": [..], "templates": [{"name", "source", "results": [{"output"} or {"error"}]}]}.
Exit code 3: the download failed.
"""

import json
import pathlib
import subprocess
import sys
import tarfile

from transformers.utils.chat_template_utils import render_jinja_template

SDIST = "llama-cpp-python==0.3.36"
INSIDE = "/vendor/llama.cpp/models/templates/"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def fetch(folder):
    templates = folder / "templates"
    if not templates.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, SDIST]
        if subprocess.run(command, timeout=300).returncode != 0:
            sys.exit(3)
        unfinished = folder / "unfinished"
        unfinished.mkdir(exist_ok=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            for member in archive:
                if INSIDE in member.name and member.name.endswith(".jinja"):
                    name = member.name.rsplit("/", 1)[1]
                    (unfinished / name).write_bytes(archive.extractfile(member).read())
        unfinished.rename(templates)
    return sorted(templates.glob("*.jinja"))


def tool(name, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": f"What {name} does: \"it's\" <é>.", "parameters": parameters}}


WEATHER = tool("get_weather", {
    "location": {"type": "string", "description": "City and country"},
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
}, ["location"])
SEARCH = tool("search", {
    "query": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "default": 10},
    "ratio": {"type": "number", "maximum": 1.5},
    "exact": {"type": "boolean", "default": False},
    "tags": {"type": "array", "items": {"type": "string"}, "description": "a\nb"},
    "range": {"type": "object", "properties": {"from": {"type": ["string", "null"]}, "to": {"type": "string"}}, "required": ["from"]},
}, ["query", "tags"])
NOTHING = tool("ping", {}, [])


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, id="call_1234"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "You are brief. \u00e9\U0001f600"}
ONE_CALL = [user("Weather in Rome?"), assistant("", tool_calls=[call("get_weather", {"location": "Rome", "unit": "celsius"})]),
            {"role": "tool", "tool_call_id": "call_1234", "name": "get_weather", "content": "{\"celsius\": 21.0}"}]
SHORT_IDS = json.loads(json.dumps(ONE_CALL).replace("call_1234", "abcDEF123"))
TWO_CALLS = [SYSTEM, user("Rome and Oslo?"),
             assistant(None, tool_calls=[call("get_weather", {"location": "Rome"}, "abcdef001"), call("search", {"query": "O'slo", "limit": 3, "tags": ["a", "b"], "exact": True, "ratio": 0.5, "range": {"from": None}}, "abcdef002")]),
             {"role": "tool", "tool_call_id": "abcdef001", "name": "get_weather", "content": "21"},
             {"role": "tool", "tool_call_id": "abcdef002", "name": "search", "content": "[]"},
             assistant("Both are fine."), user("Thanks!")]
TEXT_ARGUMENTS = json.loads(json.dumps(SHORT_IDS).replace('{"location": "Rome", "unit": "celsius"}', json.dumps('{"location": "Rome"}')))
THINKING = [user("1 + 1?"), assistant("<think>\nOne and one.\n</think>\n\n2"), user("And 2 + 2?")]
REASONING = [user("1 + 1?"), assistant("2", reasoning_content="One and one."), user("And 2 + 2?"), assistant("4", reasoning_content="Two and two.")]
PARTS = [user([{"type": "text", "text": "What"}, {"type": "text", "text": " is this?"}])]

CONVERSATIONS = [
    {"messages": [user("Hi")]},
    {"messages": [user("Hi")], "add_generation_prompt": False},
    {"messages": [SYSTEM, user("Hi")]},
    {"messages": [SYSTEM]},
    {"messages": []},
    {"messages": [SYSTEM, SYSTEM, user("Hi")]},
    {"messages": [user("Hi"), assistant("Hello!"), user("  How are you? \n")]},
    {"messages": [SYSTEM, user("Hi"), assistant("Hello!"), user("How?"), assistant("Well."), user("Good.")]},
    {"messages": [user("Hi"), assistant("Hello!")], "add_generation_prompt": False},
    {"messages": [user("Hi"), assistant("Hel")], "add_generation_prompt": True},
    {"messages": [user("a"), user("b")]},
    {"messages": [assistant("I begin."), user("Then I.")]},
    {"messages": [user("")]},
    {"messages": [user("<b>\"it's\"</b> {{ x }} {% y %} \\n \u00e9\U0001f600\n\n")]},
    {"messages": [user("Hi"), {"role": "developer", "content": "Be kind."}]},
    {"messages": [{"role": "developer", "content": "Be kind."}, user("Hi")]},
    {"messages": [{"role": "other", "content": "x"}]},
    {"messages": THINKING},
    {"messages": THINKING, "enable_thinking": False},
    {"messages": [user("Hi")], "enable_thinking": True},
    {"messages": [user("Hi")], "enable_thinking": False, "thinking": False},
    {"messages": [user("Hi")], "reasoning_effort": "high", "thinking": True},
    {"messages": REASONING},
    {"messages": PARTS},
    {"messages": [user("Hi")], "tools": []},
    {"messages": [user("Hi")], "tools": [WEATHER]},
    {"messages": [SYSTEM, user("Hi")], "tools": [WEATHER, SEARCH, NOTHING]},
    {"messages": [SYSTEM, user("Hi")], "tools": [SEARCH], "add_generation_prompt": False},
    {"messages": ONE_CALL, "tools": [WEATHER]},
    {"messages": SHORT_IDS, "tools": [WEATHER]},
    {"messages": SHORT_IDS},
    {"messages": SHORT_IDS + [assistant("21 degrees.")], "tools": [WEATHER], "add_generation_prompt": False},
    {"messages": TWO_CALLS, "tools": [WEATHER, SEARCH]},
    {"messages": TWO_CALLS[:-2], "tools": [WEATHER, SEARCH], "enable_thinking": False},
    {"messages": TEXT_ARGUMENTS, "tools": [WEATHER]},
    {"messages": [user("Hi"), assistant("I call.", tool_calls=[call("ping", {}, "abcdef003")]), {"role": "tool", "tool_call_id": "abcdef003", "name": "ping", "content": "pong"}], "tools": [NOTHING]},
    {"messages": [user("Sum it up.")], "documents": [{"title": "T", "text": "Once.", "contents": "x"}, {"title": "U", "text": "Twice.", "contents": "y"}]},
    {"messages": [user("Hi")], "builtin_tools": ["browser", "python"], "tools": [WEATHER]},
    *(
        {"messages": [SYSTEM, user("Hi"), message], "add_generation_prompt": False, "continue_final_message": True}
        for message in (
            assistant("Hel"), assistant("  Hello, \n "), assistant(""), assistant("<think>\nOne and"), assistant("<think>\nOne.\n</think>\n\nTwo"),
            assistant("Two", reasoning_content="One."), assistant([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo "}]),
        )
    ),
    {"messages": [user("Hi there")], "add_generation_prompt": False, "continue_final_message": True},
    {"messages": [SYSTEM] + [m for i in range(499) for m in (user(f"Question {i}"), assistant(f"Answer {i}"))] + [user("Last")]},
    {"messages": [m for i in range(500) for m in (user(f"Question {i}"), assistant(f"Answer {i}"))], "tools": [WEATHER]},
]


def render(source, conversation):
    conversation = {"add_generation_prompt": True, **conversation}
    try:
        rendered, _ = render_jinja_template(
            conversations=[conversation.pop("messages")], chat_template=source, **SPECIAL_TOKENS, **conversation
        )
        return {"output": rendered[0]}
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:300]}


def main():
    folder, out = map(pathlib.Path, sys.argv[1:])
    templates = []
    for path in fetch(folder):
        source = path.read_text()
        results = [render(source, conversation) for conversation in CONVERSATIONS]
        templates.append({"name": path.name, "source": source, "results": results})
    out.write_text(json.dumps({"conversations": CONVERSATIONS, "special_tokens": SPECIAL_TOKENS, "templates": templates}))


if __name__ == "__main__":
    main()
