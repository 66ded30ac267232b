"""A client of the router's gRPC API: a streamed chat, an answer that matches a JSON schema, and a call of a function.

    pip install grpcio grpcio-tools
    mkdir stubs
    python -m grpc_tools.protoc -I proto/proto --python_out=stubs --grpc_python_out=stubs proto/proto/overfill/v1/*.proto
    PYTHONPATH=stubs python examples/python/client.py localhost:50051 MODEL
"""

import json
import sys

import grpc
from overfill.v1 import common_pb2, router_pb2, router_pb2_grpc

PLACE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["city", "inhabitants"],
}


def chat(router, model, text, grammar=None, **chat_fields):
    """Streams an answer. Yields its parts."""
    request = router_pb2.GenerateRequest(
        model=model,
        messages=router_pb2.Messages(messages=[router_pb2.Message(role="user", content=text)], **chat_fields),
        # Without this message, the temperature is 1 and the seed is random.
        sampling=common_pb2.SamplingParams(temperature=0.7, top_p=1, repetition_penalty=1, seed=1, grammar=grammar),
        max_tokens=900,
        deadline_seconds=60,
    )
    for event in router.Generate(request):
        kind = event.WhichOneof("event")
        yield from getattr(event, kind).parts
        if kind == "finished":
            print(f"({event.finished.completion_tokens} tokens)", file=sys.stderr)


def main():
    address, model = sys.argv[1:3]
    with grpc.insecure_channel(address) as channel:
        router = router_pb2_grpc.RouterStub(channel)
        for served in router.ListModels(router_pb2.ListModelsRequest()).models:
            print(f"{served.name}: context of {served.max_context_tokens} tokens", file=sys.stderr)

        for part in chat(router, model, "Tell me about Paris."):
            print(part.content, end="", flush=True)
        print()

        grammar = common_pb2.Grammar(json_schema=json.dumps(PLACE))
        answer = "".join(part.content for part in chat(router, model, "Describe Paris.", grammar))
        place = json.loads(answer)
        print(place["city"], place["inhabitants"])

        tool = router_pb2.Tool(name="describe", description="Describes a place", parameters=json.dumps(PLACE))
        choice = router_pb2.ToolChoice(function="describe")
        parts = list(chat(router, model, "Describe Paris.", tools=[tool], tool_choice=choice, single_tool_call=True))
        name = next(part.tool_call.name for part in parts if part.HasField("tool_call"))
        arguments = json.loads("".join(part.tool_call_arguments for part in parts))
        print(f"{name}({arguments['city']!r}, {arguments['inhabitants']})")


if __name__ == "__main__":
    main()
