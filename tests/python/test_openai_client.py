"""Tests of the unmodified OpenAI client against the cluster at OVERFILL_URL."""

import json
import os
import unittest
from typing import Literal

import openai
import pydantic

MODEL = os.environ["OVERFILL_MODEL"]
TEXT = "The river runs past the old mill"
MESSAGES = [{"role": "user", "content": "How many bridges are there?"}]


class Reading(pydantic.BaseModel):
    """A reading of a thermometer."""

    degrees: int = pydantic.Field(ge=0, le=9)
    unit: Literal["celsius", "fahrenheit"]
    signs: list[Literal["rain", "snow"]] = pydantic.Field(max_length=2)


class Client(unittest.TestCase):
    def setUp(self):
        self.client = openai.OpenAI(
            base_url=os.environ["OVERFILL_URL"], api_key="none", max_retries=0, timeout=60
        )
        self.addCleanup(self.client.close)

    def complete(self, **changes):
        arguments = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0}
        return self.client.completions.create(**{**arguments, **changes})

    def chat(self, **changes):
        arguments = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        return self.client.chat.completions.create(**{**arguments, **changes})

    def test_models(self):
        self.assertIn(MODEL, [model.id for model in self.client.models.list()])

    def test_completion(self):
        answer = self.complete(extra_body={"ignore_eos": True})
        self.assertEqual(answer.object, "text_completion")
        self.assertEqual(answer.model, MODEL)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 8)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 8)

    def test_several_prompts(self):
        answer = self.complete(prompt=[TEXT, "Another one"], n=2)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        self.assertEqual(answer.choices[0].text, self.complete().choices[0].text)

    def test_streamed_completion_is_the_same_text(self):
        whole = self.complete()
        parts = list(self.complete(stream=True))
        self.assertEqual("".join(part.choices[0].text for part in parts), whole.choices[0].text)
        self.assertEqual(parts[-1].choices[0].finish_reason, whole.choices[0].finish_reason)

    def test_include_usage(self):
        *parts, last = self.complete(stream=True, stream_options={"include_usage": True})
        self.assertTrue(parts)
        self.assertEqual(last.choices, [])
        self.assertEqual(last.usage.prompt_tokens, self.complete().usage.prompt_tokens)

    def test_chat(self):
        answer = self.chat()
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))

    def test_streamed_chat_is_the_same_text(self):
        whole = self.chat().choices[0].message.content
        parts = list(self.chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual(parts[0].choices[0].delta.role, "assistant")
        text = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
        self.assertEqual(text, whole)
        self.assertEqual(parts[-1].choices, [])
        self.assertGreater(parts[-1].usage.completion_tokens, 0)

    def test_max_completion_tokens(self):
        answer = self.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_completion_tokens=3, extra_body={"ignore_eos": True}
        )
        self.assertEqual(answer.usage.completion_tokens, 3)

    def test_n_and_seed(self):
        first = self.chat(n=3, temperature=1, seed=5, top_p=0.9)
        self.assertEqual([choice.index for choice in first.choices], [0, 1, 2])
        again = self.chat(n=3, temperature=1, seed=5, top_p=0.9)
        texts = [[choice.message.content for choice in answer.choices] for answer in (first, again)]
        self.assertEqual(texts[0], texts[1])

    def test_logprobs(self):
        choice = self.complete(logprobs=3).choices[0]
        self.assertEqual(len(choice.logprobs.tokens), len(choice.logprobs.token_logprobs))
        self.assertTrue(all(value <= 0 for value in choice.logprobs.token_logprobs))
        self.assertTrue(all(len(top) >= 1 for top in choice.logprobs.top_logprobs))

    def test_chat_logprobs(self):
        content = self.chat(logprobs=True, top_logprobs=4).choices[0].logprobs.content
        self.assertTrue(content)
        for entry in content:
            self.assertLessEqual(entry.logprob, 0)
            self.assertEqual(len(entry.top_logprobs), 4)
            self.assertEqual(entry.token, entry.top_logprobs[0].token)
            self.assertIsInstance(entry.bytes, list)

    def test_echo_scores_the_prompt(self):
        """The request of lm-evaluation-harness: log-probabilities of a prompt given as token ids."""
        prompt = [7, 8, 9, 10, 11]
        answer = self.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1, extra_body={"ignore_eos": True})
        logprobs = answer.choices[0].logprobs
        self.assertEqual(len(logprobs.token_logprobs), len(prompt) + 1)
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertTrue(all(value <= 0 for value in logprobs.token_logprobs[1:]))

    def test_stop(self):
        whole = self.complete(max_tokens=20).choices[0].text
        stop = whole[len(whole) // 2 :][:3]
        self.assertTrue(stop)
        answer = self.complete(max_tokens=20, stop=[stop]).choices[0]
        self.assertEqual(answer.text, whole[: whole.index(stop)])
        self.assertEqual(answer.finish_reason, "stop")

    def test_logit_bias(self):
        answer = self.complete(logit_bias={"42": 100}, extra_body={"ignore_eos": True, "return_token_ids": True})
        self.assertEqual(answer.choices[0].token_ids, [42] * 8)

    def test_required_calls(self):
        """A grammar makes any model call a function with valid arguments."""
        digit = {"type": "integer", "minimum": 0, "maximum": 9}
        unit = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        parameters = {
            "type": "object",
            "properties": {"a": digit, "b": unit},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
        tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
        named = {"type": "function", "function": {"name": "g"}}
        for choice, names in (("required", ("f", "g")), (named, ("g",))):
            arguments = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
            whole = self.chat(**arguments).choices[0]
            self.assertEqual(whole.finish_reason, "tool_calls")
            (call,) = whole.message.tool_calls
            self.assertIn(call.function.name, names)
            values = json.loads(call.function.arguments)
            self.assertEqual(list(values), ["a", "b"])
            self.assertIn(values["a"], range(10))
            self.assertIn(values["b"], unit["enum"])
            deltas = [part.choices[0].delta for part in self.chat(**arguments, stream=True)]
            fragments = [one.function.arguments for delta in deltas for one in delta.tool_calls or []]
            self.assertEqual("".join(fragments), call.function.arguments)

    def test_parsed_answers(self):
        """The client makes a JSON schema of a pydantic model, and parses the answer into it."""
        parse = lambda **changes: self.client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=300, **changes
        )
        choice = parse(response_format=Reading).choices[0]
        self.assertEqual(choice.finish_reason, "stop")
        self.assertIsInstance(choice.message.parsed, Reading)
        self.assertIsNone(choice.message.refusal)
        response = self.client.responses.parse(
            model=MODEL, input=MESSAGES, text_format=Reading, temperature=0, max_output_tokens=300
        )
        self.assertEqual(response.output_parsed, choice.message.parsed)
        with self.client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, response_format=Reading, temperature=0, max_tokens=300
        ) as stream:
            kinds = {event.type for event in stream}
            self.assertEqual(stream.get_final_completion().choices[0].message.parsed, choice.message.parsed)
        self.assertLessEqual({"content.delta", "content.done"}, kinds)
        (call,) = parse(
            tools=[openai.pydantic_function_tool(Reading)], tool_choice="required", parallel_tool_calls=False
        ).choices[0].message.tool_calls
        self.assertIsInstance(call.function.parsed_arguments, Reading)
        with self.assertRaises(openai.LengthFinishReasonError):
            self.client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Reading, max_tokens=3)

    def test_errors_are_the_clients_own_types(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(temperature=-1)
        self.assertIn("temperature", caught.exception.message)
        with self.assertRaises(openai.NotFoundError):
            self.complete(model="nobody")
        with self.assertRaises(openai.BadRequestError):
            self.chat(messages=[])


if __name__ == "__main__":
    unittest.main()
