"""The Responses API with the unmodified OpenAI client. OVERFILL_URL is a router with a model for each format of calls, whose
answers are fixed: `I look.` and two calls of get_weather."""

import json
import os
import unittest

import openai
import pydantic

FORMATS = ["hermes", "llama3_json", "pythonic", "mistral", "mistral_named", "qwen3", "deepseek_r1"]
REASONING = ["qwen3", "deepseek_r1"]
CITIES = ["Köln", "São Paulo \"centro\"\n"]
QUESTION = "What is the weather in Köln and São Paulo?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}


class get_weather(pydantic.BaseModel):
    """The weather in a city."""

    city: str
    days: int


class Responses(unittest.TestCase):
    def setUp(self):
        self.client = openai.OpenAI(
            base_url=os.environ["OVERFILL_URL"], api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
        )
        self.addCleanup(self.client.close)

    def create(self, model, **changes):
        arguments = {"model": model, "input": QUESTION, "tools": [TOOL], "max_output_tokens": 1000}
        return self.client.responses.create(**{**arguments, **changes})

    def check(self, model, response):
        self.assertEqual(response.status, "completed")
        self.assertEqual(response.model, model)
        calls = [item for item in response.output if item.type == "function_call"]
        self.assertEqual([call.name for call in calls], ["get_weather", "get_weather"])
        self.assertEqual([json.loads(call.arguments) for call in calls], [{"city": city, "days": 2} for city in CITIES])
        self.assertNotEqual(calls[0].call_id, calls[1].call_id)
        reasoning = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
        self.assertEqual(reasoning, ["Two cities."] if model in REASONING else [])
        self.assertIn(response.output_text, ("I look.", ""))
        usage = response.usage
        self.assertEqual(usage.total_tokens, usage.input_tokens + usage.output_tokens)
        self.assertEqual(usage.output_tokens_details.reasoning_tokens > 0, model in REASONING)

    def test_whole(self):
        for model in FORMATS:
            with self.subTest(model):
                self.check(model, self.create(model, instructions="Be brief.", metadata={"a": "b"}, store=True))

    def test_events(self):
        for model in FORMATS:
            with self.subTest(model):
                events = list(self.create(model, stream=True))
                self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
                self.assertEqual([events[0].type, events[1].type], ["response.created", "response.in_progress"])
                self.assertEqual(events[-1].type, "response.completed")
                self.check(model, events[-1].response)
                done = [event.item for event in events if event.type == "response.output_item.done"]
                self.assertEqual(done, events[-1].response.output)

    def test_the_client_joins_the_stream(self):
        """The client's own helper joins events, and parses arguments into a model of pydantic."""
        tool = openai.pydantic_function_tool(get_weather)
        tool = {"type": "function", **tool["function"]}
        for model in FORMATS:
            with self.subTest(model):
                with self.client.responses.stream(model=model, input=QUESTION, tools=[tool]) as stream:
                    kinds = [event.type for event in stream]
                    response = stream.get_final_response()
                self.assertEqual(kinds.count("response.function_call_arguments.done"), 2)
                self.assertGreater(kinds.count("response.function_call_arguments.delta"), 10)
                self.check(model, response)
                calls = [item for item in response.output if item.type == "function_call"]
                self.assertEqual([call.parsed_arguments["city"] for call in calls], CITIES)

    def test_the_answer_goes_back(self):
        """A turn with the answer's own items and the results of its calls."""
        for model in FORMATS:
            with self.subTest(model):
                output = self.create(model).output
                results = [
                    {"type": "function_call_output", "call_id": item.call_id, "output": "21"}
                    for item in output
                    if item.type == "function_call"
                ]
                self.check(model, self.create(model, input=[{"role": "user", "content": QUESTION}, *output, *results]))

    def test_text_alone(self):
        response = self.create("hermes", tools=[], tool_choice="none")
        self.assertIn("get_weather", response.output_text)
        self.assertEqual([item.type for item in response.output], ["message"])

    def test_one_call(self):
        output = self.create("hermes", parallel_tool_calls=False).output
        self.assertEqual([item.type for item in output], ["message", "function_call"])

    def test_cut_off(self):
        response = self.create("hermes", max_output_tokens=3)
        self.assertEqual((response.status, response.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        self.assertEqual(response.output_text, "I l")

    def test_log_probabilities(self):
        response = self.create(
            "hermes", tools=[], include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=5
        )
        entries = response.output[0].content[0].logprobs
        self.assertEqual("".join(entry.token for entry in entries), response.output_text)
        self.assertTrue(all(len(entry.top_logprobs) == 2 for entry in entries))

    def test_errors(self):
        for changes, name in [
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"input": []}, "input"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tools": [{**TOOL, "name": "no name"}]}, "tools[0].name"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ]:
            with self.subTest(name):
                with self.assertRaises(openai.BadRequestError) as caught:
                    self.create("hermes", **changes)
                self.assertEqual(caught.exception.param, name)
        with self.assertRaises(openai.NotFoundError):
            self.create("nobody")
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.retrieve("resp_1")


if __name__ == "__main__":
    unittest.main()
