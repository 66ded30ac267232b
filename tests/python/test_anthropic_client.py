"""The Messages API with the unmodified Anthropic client. OVERFILL_URL is a router with a model for each format of calls, whose
answers are fixed: `I look.` and two calls of get_weather."""

import os
import unittest

import anthropic

FORMATS = ["hermes", "llama3_json", "pythonic", "mistral", "mistral_named", "qwen3", "deepseek_r1"]
REASONING = ["qwen3", "deepseek_r1"]
CITIES = ["Köln", "São Paulo \"centro\"\n"]
MESSAGES = [{"role": "user", "content": "What is the weather in Köln and São Paulo?"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}


class Messages(unittest.TestCase):
    def setUp(self):
        self.client = anthropic.Anthropic(
            base_url=os.environ["OVERFILL_URL"].removesuffix("/v1"), api_key="none", max_retries=0, timeout=60
        )
        self.addCleanup(self.client.close)

    def create(self, model, **changes):
        arguments = {"model": model, "messages": MESSAGES, "tools": [TOOL], "max_tokens": 1000}
        return self.client.messages.create(**{**arguments, **changes})

    def check(self, model, message):
        self.assertEqual((message.type, message.role, message.model), ("message", "assistant", model))
        self.assertEqual((message.stop_reason, message.stop_sequence), ("tool_use", None))
        calls = [block for block in message.content if block.type == "tool_use"]
        self.assertEqual([call.name for call in calls], ["get_weather", "get_weather"])
        self.assertEqual([call.input for call in calls], [{"city": city, "days": 2} for city in CITIES])
        self.assertNotEqual(calls[0].id, calls[1].id)
        thinking = [block.thinking for block in message.content if block.type == "thinking"]
        self.assertEqual(thinking, ["Two cities."] if model in REASONING else [])
        text = "".join(block.text for block in message.content if block.type == "text")
        self.assertIn(text, ("I look.", ""))
        self.assertGreater(message.usage.output_tokens, 50)

    def test_whole(self):
        for model in FORMATS:
            with self.subTest(model):
                message = self.create(model, system="Be brief.", metadata={"user_id": "u"})
                self.check(model, message)
                self.assertTrue(message.id.startswith("msg_"))

    def test_events(self):
        for model in FORMATS:
            with self.subTest(model):
                kinds = [event.type for event in self.create(model, stream=True)]
                self.assertEqual(kinds[0], "message_start")
                self.assertEqual(kinds[-2:], ["message_delta", "message_stop"])
                self.assertEqual(kinds.count("content_block_start"), kinds.count("content_block_stop"))
                self.assertGreater(kinds.count("content_block_delta"), 10)

    def test_the_client_joins_the_stream(self):
        for model in FORMATS:
            with self.subTest(model):
                with self.client.messages.stream(
                    model=model, messages=MESSAGES, tools=[TOOL], max_tokens=1000
                ) as stream:
                    text = "".join(stream.text_stream)
                    message = stream.get_final_message()
                self.check(model, message)
                self.assertEqual(text, "".join(block.text for block in message.content if block.type == "text"))
                self.assertGreater(message.usage.input_tokens, 20)

    def test_the_answer_goes_back(self):
        """A turn with the answer's own blocks and the results of its calls."""
        for model in FORMATS:
            with self.subTest(model):
                content = self.create(model).content
                results = [
                    {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "21"}]}
                    for block in content
                    if block.type == "tool_use"
                ]
                turns = [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
                self.check(model, self.create(model, messages=[*MESSAGES, *turns]))

    def test_choices(self):
        one = self.create("hermes", tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        self.assertEqual([block.type for block in one.content], ["text", "tool_use"])
        none = self.create("hermes", tool_choice={"type": "none"})
        self.assertEqual(([block.type for block in none.content], none.stop_reason), (["text"], "end_turn"))

    def test_ends(self):
        message = self.create("hermes", max_tokens=3)
        self.assertEqual((message.stop_reason, message.content[0].text), ("max_tokens", "I l"))
        self.assertEqual(message.usage.output_tokens, 3)
        message = self.create("hermes", stop_sequences=["ok."])
        self.assertEqual((message.stop_reason, message.stop_sequence), ("stop_sequence", "ok."))
        self.assertEqual(message.content[0].text, "I lo")

    def test_count_tokens(self):
        count = lambda **changes: self.client.messages.count_tokens(model="hermes", messages=MESSAGES, **changes)
        tokens = count().input_tokens
        self.assertEqual(tokens, self.create("hermes", tools=[]).usage.input_tokens)
        self.assertGreater(count(system="Be brief.").input_tokens, tokens)

    def test_models(self):
        self.assertIn("hermes", [model.id for model in self.client.models.list().data])

    def test_errors(self):
        for changes, fault in [
            ({"messages": []}, "messages must have at least one message, got 0"),
            ({"extra_body": {"temperature": -1}}, "temperature must be in [0, 100], got -1"),
            ({"tools": [{**TOOL, "input_schema": 3}]}, "tools[0].input_schema must be a JSON schema"),
            ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ]:
            with self.subTest(fault):
                with self.assertRaises(anthropic.BadRequestError) as caught:
                    self.create("hermes", **changes)
                error = caught.exception.body["error"]
                self.assertEqual(error["type"], "invalid_request_error")
                self.assertIn(fault, error["message"])
        with self.assertRaises(anthropic.NotFoundError):
            self.create("nobody")


if __name__ == "__main__":
    unittest.main()
