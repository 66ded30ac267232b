"""Tools and reasoning with LangChain's unmodified ChatOpenAI. OVERFILL_URL is a router with a model for each format of calls,
whose answers are fixed: `I look.` and two calls of get_weather."""

import os
import unittest

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

FORMATS = ["hermes", "llama3_json", "pythonic", "mistral", "mistral_named"]
CITIES = ["Köln", "São Paulo \"centro\"\n"]
QUESTION = "What is the weather in Köln and São Paulo?"


@tool
def get_weather(city: str, days: int = 1) -> str:
    """The weather in a city."""
    return f"{days} days of rain in {city}"


class Tools(unittest.TestCase):
    def model(self, name, **changes):
        return ChatOpenAI(
            model=name, base_url=os.environ["OVERFILL_URL"], api_key="none", max_retries=0, timeout=60, max_tokens=1000, **changes
        )

    def check(self, message):
        self.assertEqual([call["name"] for call in message.tool_calls], ["get_weather", "get_weather"])
        self.assertEqual([call["args"] for call in message.tool_calls], [{"city": city, "days": 2} for city in CITIES])
        self.assertEqual(message.invalid_tool_calls, [])
        self.assertNotEqual(message.tool_calls[0]["id"], message.tool_calls[1]["id"])

    def test_invoke(self):
        for name in FORMATS:
            with self.subTest(name):
                message = self.model(name).bind_tools([get_weather]).invoke(QUESTION)
                self.check(message)
                self.assertIn(message.content, ("I look.", ""))
                self.assertEqual(message.response_metadata["finish_reason"], "tool_calls")
                self.assertGreater(message.usage_metadata["output_tokens"], 50)

    def test_stream(self):
        for name in FORMATS:
            with self.subTest(name):
                chunks = list(self.model(name, stream_usage=True).bind_tools([get_weather]).stream(QUESTION))
                self.assertGreater(len(chunks), 10)
                whole = sum(chunks[1:], chunks[0])
                self.assertIsInstance(whole, AIMessageChunk)
                self.check(whole)
                self.assertIn(whole.content, ("I look.", ""))
                self.assertGreater(whole.usage_metadata["output_tokens"], 50)

    def test_results_go_back(self):
        """The turn of an agent: its calls, their results, the next answer."""
        for name in FORMATS:
            with self.subTest(name):
                model = self.model(name).bind_tools([get_weather])
                first = model.invoke(QUESTION)
                results = [get_weather.invoke(call) for call in first.tool_calls]
                self.assertTrue(all(isinstance(result, ToolMessage) for result in results))
                self.check(model.invoke([HumanMessage(QUESTION), first, *results]))

    def test_responses_api(self):
        for name in FORMATS:
            with self.subTest(name):
                model = self.model(name, use_responses_api=True).bind_tools([get_weather])
                first = model.invoke(QUESTION)
                self.check(first)
                results = [get_weather.invoke(call) for call in first.tool_calls]
                self.check(model.invoke([HumanMessage(QUESTION), first, *results]))
                chunks = list(model.stream(QUESTION))
                self.check(sum(chunks[1:], chunks[0]))


if __name__ == "__main__":
    unittest.main()
