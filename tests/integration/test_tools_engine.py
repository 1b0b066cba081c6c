"""Tools on the real engine: decoding that is held to a schema, and an answer that goes on from a result."""

import json

import jsonschema

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS},
}
NAMED = {"type": "function", "function": {"name": "weather"}}
# A call that is cut off is none: the longest expression that the calculator takes fits.
FORCED = {"max_tokens": 640, "temperature": 0.0}


def test_a_forced_call_of_the_clients_fits_its_schema(stack):
    for seed in range(5):
        choice = stack.ask(
            "The weather in Rome?", tools=[WEATHER], tool_choice=NAMED, seed=seed, max_tokens=256
        ).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_forced_tool_of_the_servers_is_called_and_the_answer_goes_on(stack):
    options = {"server_tools": ["date_time"]}
    answer = stack.ask("Which day is it?", tool_choice="required", extra_body=options, **FORCED)
    step, *others, stop = answer.choices[0].model_extra["steps"]
    (call,) = step["calls"]
    assert call["tool"] == "date_time" and call["status"] in ("ok", "error")
    # What this small model makes of it is its own: it may answer, or call again, in time or not.
    assert others or stop["stop"] in ("answered", "cut_off")
    assert (
        answer.usage.completion_tokens > step["tokens"] and answer.usage.prompt_tokens > 2 * step["prompt_tokens"]
    )


def test_a_forced_tool_streams(stack):
    options = {"server_tools": ["calculator"], "stream_options": {"include_usage": True, "include_steps": True}}
    choice = {"type": "function", "function": {"name": "calculator"}}
    stream = stack.ask("What is 6 times 7?", stream=True, tool_choice=choice, extra_body=options, **FORCED)
    chunks = list(stream)
    steps = [chunk.model_extra["step"] for chunk in chunks if "step" in (chunk.model_extra or {})]
    assert [step["calls"][0]["tool"] for step in steps][:2] == ["calculator", "calculator"]
    assert isinstance(steps[1]["calls"][0]["arguments"]["expression"], str)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "<tool_call>" not in text and chunks[-1].usage.completion_tokens > steps[1]["tokens"]
