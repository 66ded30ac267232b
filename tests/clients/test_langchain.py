"""LangChain's unmodified ChatOpenAI against the cluster at OVERFILL_URL, whose models have random weights: grammars make their
answers valid."""

import asyncio
import os
import unittest
from typing import Literal

import pydantic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

MODEL = os.environ["OVERFILL_MODEL"]
QUESTION = "How many bridges are there?"
UNITS = ("celsius", "fahrenheit")


class Reading(pydantic.BaseModel):
    """A reading of a thermometer."""

    degrees: int = pydantic.Field(ge=0, le=9)
    unit: Literal["celsius", "fahrenheit"]


@tool
def read(degrees: Literal[0, 1, 2], unit: Literal["celsius", "fahrenheit"]) -> str:
    """Reads a thermometer."""
    return f"{degrees} {unit}"


@tool
def wait(minutes: Literal[5, 10]) -> str:
    """Waits."""
    return f"{minutes} minutes later"


class LangChain(unittest.TestCase):
    def setUp(self):
        self.options = {
            "model": MODEL, "base_url": os.environ["OVERFILL_URL"], "api_key": "none", "max_retries": 0, "timeout": 60,
            "temperature": 0, "max_tokens": 200,
        }
        self.model = ChatOpenAI(**self.options)

    def check_call(self, message, name):
        (call,) = message.tool_calls
        self.assertEqual(call["name"], name)
        # The function itself checks the arguments.
        return {"read": read, "wait": wait}[name].invoke(call["args"])

    def test_chat(self):
        short = self.model.bind(max_tokens=8)
        whole = short.invoke(QUESTION)
        self.assertIn(whole.response_metadata["finish_reason"], ("stop", "length"))
        self.assertEqual("".join(chunk.content for chunk in short.stream(QUESTION)), whole.content)
        usage = whole.usage_metadata
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])

    def test_completions(self):
        model = OpenAI(**{**self.options, "max_tokens": 8})
        whole = model.invoke("The river runs")
        self.assertEqual("".join(model.stream("The river runs")), whole)

    def test_several_at_once(self):
        questions = [f"{QUESTION} {i}" for i in range(6)]
        model = self.model.bind(max_tokens=8)
        alone = [model.invoke(question).content for question in questions]
        self.assertEqual([message.content for message in model.batch(questions)], alone)
        together = asyncio.run(model.abatch(questions))
        self.assertEqual([message.content for message in together], alone)

    def test_forced_calls(self):
        # Without `strict`, the schema allows more properties, and a model with random weights does not stop writing them.
        one = {"parallel_tool_calls": False, "strict": True}
        for name in ("read", "wait"):
            model = self.model.bind_tools([read, wait], tool_choice=name, **one)
            result = self.check_call(model.invoke(QUESTION), name)
            chunks = list(model.stream(QUESTION))
            self.assertEqual(self.check_call(sum(chunks[1:], chunks[0]), name), result)
        message = self.model.bind_tools([read, wait], tool_choice="any", **one).invoke(QUESTION)
        self.check_call(message, message.tool_calls[0]["name"])

    def test_structured_output(self):
        for method in ("json_schema", "function_calling"):
            with self.subTest(method):
                answer = self.model.with_structured_output(Reading, method=method, strict=True, include_raw=True).invoke(QUESTION)
                self.assertIsNone(answer["parsing_error"])
                self.assertIsInstance(answer["parsed"], Reading)
                self.assertIn(answer["parsed"].unit, UNITS)
                structured = self.model.with_structured_output(Reading, method=method, strict=True)
                self.assertEqual(structured.invoke(QUESTION), answer["parsed"])
                *_, last = structured.stream(QUESTION)
                self.assertEqual(last, answer["parsed"])

    def test_structured_output_of_the_responses_api(self):
        model = ChatOpenAI(**self.options, use_responses_api=True)
        answer = model.with_structured_output(Reading, method="json_schema").invoke(QUESTION)
        self.assertEqual(answer, self.model.with_structured_output(Reading, method="json_schema").invoke(QUESTION))


if __name__ == "__main__":
    unittest.main()
