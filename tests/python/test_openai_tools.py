"""Tools and reasoning with the unmodified OpenAI client. OVERFILL_URL is a router with a model for each format of calls, whose
answers are fixed: `I look.` and two calls of get_weather."""

import json
import os
import unittest

import openai
import pydantic

FORMATS = ["hermes", "llama3_json", "pythonic", "mistral", "mistral_named"]
CITIES = ["Köln", "São Paulo \"centro\"\n"]
MESSAGES = [{"role": "user", "content": "What is the weather in Köln and São Paulo?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


class get_weather(pydantic.BaseModel):
    """The weather in a city."""

    city: str
    days: int


class Tools(unittest.TestCase):
    def setUp(self):
        self.client = openai.OpenAI(base_url=os.environ["OVERFILL_URL"], api_key="none", max_retries=0, timeout=60)
        self.addCleanup(self.client.close)

    def chat(self, model, **changes):
        arguments = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 1000}
        return self.client.chat.completions.create(**{**arguments, **changes})

    def check(self, message):
        calls = message.tool_calls
        self.assertEqual([call.type for call in calls], ["function", "function"])
        self.assertEqual([call.function.name for call in calls], ["get_weather", "get_weather"])
        arguments = [json.loads(call.function.arguments) for call in calls]
        self.assertEqual(arguments, [{"city": city, "days": 2} for city in CITIES])
        self.assertNotEqual(calls[0].id, calls[1].id)

    def test_whole(self):
        for model in FORMATS:
            with self.subTest(model):
                choice = self.chat(model).choices[0]
                self.assertEqual(choice.finish_reason, "tool_calls")
                self.assertIn(choice.message.content, ("I look.", None))
                self.check(choice.message)

    def test_streamed(self):
        for model in FORMATS:
            with self.subTest(model):
                calls, content, reasons = {}, "", []
                for chunk in self.chat(model, stream=True):
                    for choice in chunk.choices:
                        content += choice.delta.content or ""
                        reasons.append(choice.finish_reason)
                        for call in choice.delta.tool_calls or []:
                            known = calls.setdefault(call.index, call)
                            if known is not call:
                                self.assertIsNone(call.id)
                                self.assertIsNone(call.function.name)
                                known.function.arguments += call.function.arguments
                self.assertIn(content, ("I look.", ""))
                self.assertEqual([reason for reason in reasons if reason], ["tool_calls"])
                self.assertEqual(list(calls), [0, 1])
                arguments = [json.loads(call.function.arguments) for call in calls.values()]
                self.assertEqual(arguments, [{"city": city, "days": 2} for city in CITIES])

    def test_the_client_joins_the_stream(self):
        """The client's own helper joins chunks, and parses arguments into a model of pydantic."""
        tools = [openai.pydantic_function_tool(get_weather)]
        for model in FORMATS:
            with self.subTest(model):
                with self.client.chat.completions.stream(
                    model=model, messages=MESSAGES, tools=tools, max_tokens=1000
                ) as stream:
                    kinds = [event.type for event in stream]
                    completion = stream.get_final_completion()
                self.assertEqual(kinds.count("tool_calls.function.arguments.done"), 2)
                self.assertGreater(kinds.count("tool_calls.function.arguments.delta"), 10)
                self.check(completion.choices[0].message)
                parsed = [call.function.parsed_arguments for call in completion.choices[0].message.tool_calls]
                self.assertEqual([one.city for one in parsed], CITIES)

    def test_the_answer_goes_back(self):
        """A turn with the answer's own message and the results of its calls."""
        for model in FORMATS:
            with self.subTest(model):
                message = self.chat(model).choices[0].message
                results = [
                    {"role": "tool", "tool_call_id": call.id, "content": "21"} for call in message.tool_calls
                ]
                again = self.chat(model, messages=[*MESSAGES, message.model_dump(exclude_none=True), *results])
                self.check(again.choices[0].message)

    def test_one_call_and_none(self):
        for model in FORMATS:
            with self.subTest(model):
                self.assertEqual(len(self.chat(model, parallel_tool_calls=False).choices[0].message.tool_calls), 1)
                choice = self.chat(model, tool_choice="none").choices[0]
                self.assertIsNone(choice.message.tool_calls)
                self.assertIn("get_weather", choice.message.content)
                self.assertEqual(choice.finish_reason, "stop")

    def test_reasoning(self):
        for model in ("qwen3", "deepseek_r1"):
            with self.subTest(model):
                whole = self.chat(model).choices[0].message
                self.assertEqual(whole.reasoning_content, "Two cities.")
                self.check(whole)
                parts = [chunk.choices[0].delta for chunk in self.chat(model, stream=True) if chunk.choices]
                reasoning = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
                self.assertEqual(reasoning, "Two cities.")
                self.assertEqual("".join(part.content or "" for part in parts), whole.content or "")

    def test_errors(self):
        for changes, name in [
            ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools[0].function.name"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ]:
            with self.assertRaises(openai.BadRequestError) as caught:
                self.chat("hermes", **changes)
            self.assertEqual(caught.exception.param, name)


if __name__ == "__main__":
    unittest.main()
