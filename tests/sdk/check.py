"""A running server, seen by the official clients in strict mode: every body and every event is validated against their
types, and responses against Open Responses' own.

    python tests/sdk/check.py BASE_URL KEY MODEL

The examples of the service's documents stand here word for word, but for the model's name and the address.
"""

import http.server
import json
import queue
import sys
import threading
import time

import anthropic
import openai
import openresponses_types as open_responses
from pydantic import BaseModel, TypeAdapter

BASE_URL, KEY, MODEL = sys.argv[1:]
client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True)
claude = anthropic.Anthropic(base_url=BASE_URL, api_key=KEY, max_retries=0, _strict_response_validation=True)
HI = [{"role": "user", "content": "Say hello in one word."}]


def models():
    listed = client.models.list()
    assert MODEL in [model.id for model in listed], listed
    assert client.models.retrieve(MODEL).id == MODEL
    page = claude.models.list()
    assert MODEL in [model.id for model in page.data] and not page.has_more
    assert claude.models.retrieve(MODEL).max_input_tokens > 0
    try:
        client.models.retrieve("no/such model")
        raise AssertionError("found")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.request_id.startswith("req_"), error


def chat():
    plain = client.chat.completions.create(model=MODEL, messages=HI, temperature=0, max_completion_tokens=8)
    assert plain.choices[0].message.content and plain._request_id.startswith("req_")
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, temperature=0, max_completion_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content, (text, plain)
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    with client.chat.completions.stream(
        model=MODEL, messages=HI, n=2, seed=5, max_completion_tokens=8, logprobs=True, top_logprobs=2
    ) as helper:
        for _ in helper:
            pass
        # The helper refuses to give a completion that was cut off as final.
        final = helper.current_completion_snapshot
    same = client.chat.completions.create(
        model=MODEL, messages=HI, n=2, seed=5, max_completion_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [c.message.content for c in final.choices] == [c.message.content for c in same.choices]
    assert [c.logprobs for c in final.choices] == [c.logprobs for c in same.choices]


class Person(BaseModel):
    name: str
    age: int


def structured():
    messages = [{"role": "user", "content": "Ann is 30 years old. Give me her name and age as JSON."}]
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Person, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Person), parsed
    response = client.responses.parse(model=MODEL, input=messages, text_format=Person, temperature=0)
    assert isinstance(response.output_parsed, Person), response
    message = claude.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=messages,
        output_config={"format": {"type": "json_schema", "schema": {**Person.model_json_schema(), "additionalProperties": False}}},
        extra_body={"temperature": 0},
    )
    Person.model_validate_json(message.content[0].text)


def completions():
    # The first token of an echoed prompt has no log-probability, and chunks before the last have no finish reason: the
    # service sends null, which its clients' strict types do not know.
    lenient = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0)
    echoed = lenient.completions.create(
        model=MODEL, prompt=[[504, 3575, 282], [28, 198, 1]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    assert [choice.index for choice in echoed.choices] == [0, 1]
    for choice in echoed.choices:
        entries = choice.logprobs
        assert len(entries.tokens) == len(entries.token_logprobs) == len(entries.top_logprobs) == 4
        assert entries.token_logprobs[0] is None and entries.token_logprobs[3] == max(entries.top_logprobs[3].values())
    chunks = list(lenient.completions.create(model=MODEL, prompt="The sea", max_tokens=5, temperature=0, stream=True))
    plain = client.completions.create(model=MODEL, prompt="The sea", max_tokens=5, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text


def responses():
    response = client.responses.create(model=MODEL, input="Name a river.", temperature=0, max_output_tokens=12)
    assert response.output_text
    raw = client.responses.with_raw_response.create(model=MODEL, input="Name a river.", temperature=0, max_output_tokens=12)
    open_responses.ResponseResource.model_validate(json.loads(raw.text() if callable(raw.text) else raw.text))
    with client.responses.stream(model=MODEL, input="Say: hello", temperature=0) as helper:
        events = list(helper)
        final = helper.get_final_response()
    assert final.status == "completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text
    # Whatever a response holds is taken back.
    again = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Say: hello"}, *final.output, {"role": "user", "content": "Again!"}],
        max_output_tokens=8,
    )
    assert again.output_text is not None
    for event in client.responses.create(model=MODEL, input="Count to 100.", temperature=0, max_output_tokens=4, stream=True):
        pass
    assert event.type == "response.incomplete" and event.response.incomplete_details.reason == "max_output_tokens"
    counted = client.responses.input_tokens.count(model=MODEL, input="Name a river.")
    assert counted.input_tokens == response.usage.input_tokens


def open_responses_events():
    """Every event as Open Responses has it."""
    types = {}
    for name in dir(open_responses):
        if name.endswith("StreamingEvent"):
            model = getattr(open_responses, name)
            (kind,) = model.model_fields["type"].annotation
            types[kind.value] = TypeAdapter(model)
    seen = set()
    stream = client.responses.with_streaming_response.create(model=MODEL, input="Hi", max_output_tokens=6, stream=True)
    with stream as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                seen.add(event["type"])
                types[event["type"]].validate_python(event)
    assert {"response.created", "response.output_text.delta", "response.incomplete"} <= seen, seen


def messages():
    message = claude.messages.create(model=MODEL, max_tokens=8, messages=HI)
    assert message.content[0].type == "text" and message._request_id.startswith("req_")
    with claude.messages.stream(model=MODEL, max_tokens=8, messages=HI, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason in ("end_turn", "max_tokens")
    counted = claude.messages.count_tokens(model=MODEL, messages=HI)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    try:
        claude.messages.create(model=MODEL, max_tokens=8, messages=[{"role": "user", "content": "word " * 9000}])
        raise AssertionError("accepted")
    except anthropic.BadRequestError as error:
        assert "prompt is too long" in str(error), error


FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def tools():
    """The model must call; what it calls with is the schema's. Streamed and not, in every dialect, and there and back."""
    model, question = "with-tools", [{"role": "user", "content": "What is the weather in Paris?"}]
    chat_tools = [{"type": "function", "function": FUNCTION}]
    arguments = {"model": model, "messages": question, "tools": chat_tools, "tool_choice": "required", "temperature": 0}
    plain = client.chat.completions.create(**arguments)
    (call,) = plain.choices[0].message.tool_calls
    assert plain.choices[0].finish_reason == "tool_calls" and plain.choices[0].message.content is None, plain
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    with client.chat.completions.stream(**arguments) as helper:
        for _ in helper:
            pass
        (streamed,) = helper.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments and streamed.function.name == call.function.name
    answer = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    again = [*question, plain.choices[0].message.to_dict(), answer]
    assert client.chat.completions.create(model=model, messages=again, tools=chat_tools, max_tokens=8).choices

    response_tools = [{"type": "function", **FUNCTION}]
    arguments = {"model": model, "input": question, "tools": response_tools, "tool_choice": "required", "temperature": 0}
    response = client.responses.create(**arguments)
    (item,) = response.output
    assert item.type == "function_call" and item.arguments == call.function.arguments and item.id != item.call_id, item
    with client.responses.stream(**arguments) as helper:
        for _ in helper:
            pass
        (streamed,) = helper.get_final_response().output
    assert streamed.arguments == item.arguments
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny."}
    assert client.responses.create(
        model=model, input=[*question, *response.output, output], tools=response_tools, max_output_tokens=8
    ).output

    schema = FUNCTION["parameters"]
    claude_tools = [{"name": "get_weather", "description": FUNCTION["description"], "input_schema": schema}]
    arguments = {"model": model, "max_tokens": 99, "messages": question, "tools": claude_tools, "tool_choice": {"type": "any"}}
    arguments["extra_body"] = {"temperature": 0}
    message = claude.messages.create(**arguments)
    (block,) = message.content
    assert message.stop_reason == "tool_use" and block.input == json.loads(call.function.arguments), message
    with claude.messages.stream(**arguments) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input and final.stop_reason == "tool_use"
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}]}
    turns = [*question, {"role": "assistant", "content": message.content}, result]
    assert claude.messages.create(model=model, max_tokens=8, messages=turns, tools=claude_tools).content


def errors():
    for arguments, status in [
        ({"input": []}, openai.BadRequestError),
        ({"input": "Hi", "metadata": {"completion_window": "tomorrow"}}, openai.BadRequestError),
        ({"input": "Hi", "stream": True, "temperature": 7}, openai.BadRequestError),
        ({"input": "Hi", "model": "nobody"}, openai.NotFoundError),
    ]:
        try:
            client.responses.create(**{"model": MODEL, **arguments})
            raise AssertionError(f"accepted: {arguments}")
        except status as error:
            assert error.type == "invalid_request_error" and error.param, (arguments, error)
    try:
        openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="wrong", max_retries=0).models.list()
        raise AssertionError("accepted")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"
    try:
        anthropic.Anthropic(base_url=BASE_URL, api_key="wrong", max_retries=0).models.list()
        raise AssertionError("accepted")
    except anthropic.AuthenticationError:
        pass


def documents_realtime():
    """The example of realtime in "Inference modes"."""
    response = client.responses.create(
        model="moonshotai/Kimi-K2.6",
        input="Summarize the latest support ticket in one sentence.",
    )

    print(response.output_text)


def documents_async():
    """The example of async in "Inference modes"; then what becomes of it."""
    started = client.responses.create(
        model="moonshotai/Kimi-K2.6",
        input="Classify this ticket and draft a reply.",
        background=True,  # returns a response id right away
        metadata={"completion_window": "standard"},
    )

    print("Queued:", started.id)
    assert started.status == "queued" and started.background, started
    events = list(client.responses.retrieve(started.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    ended = client.responses.retrieve(started.id)
    assert events[-1].response == ended and ended.status in ("completed", "incomplete"), ended
    assert list(client.responses.retrieve(started.id, stream=True, starting_after=4)) == events[5:]
    open_responses.ResponseResource.model_validate(ended.to_dict())
    try:
        client.responses.cancel(started.id)
        raise AssertionError("cancelled")
    except openai.BadRequestError as error:
        assert "Cannot cancel" in str(error), error


def documents_windows():
    """The example in "Completion windows"."""
    response = client.responses.create(
        model="zai-org/GLM-5.1-FP8",
        input="Explain the key ideas behind transformers.",
        background=True,
        metadata={
            "completion_window": "standard"
        }
    )
    assert response.completion_window == "standard" and response.metadata == {"completion_window": "standard"}, response
    assert list(client.responses.retrieve(response.id, stream=True))[-1].response.model == "zai-org/GLM-5.1-FP8"


def stored():
    first = client.responses.create(model=MODEL, input="My name is Ann.", temperature=0, max_output_tokens=8)
    items = [{"role": "user", "content": "What"}, {"role": "user", "content": "is my name?"}]
    second = client.responses.create(model=MODEL, input=items, previous_response_id=first.id, max_output_tokens=8)
    assert client.responses.retrieve(second.id) == second and second.previous_response_id == first.id
    listed = list(client.responses.input_items.list(second.id, limit=1, order="asc"))
    assert [item.content[0].text for item in listed] == ["What", "is my name?"], listed
    client.responses.delete(first.id)
    for call in [lambda: client.responses.retrieve(first.id), lambda: client.responses.input_items.list(first.id)]:
        try:
            call()
            raise AssertionError("found")
        except openai.NotFoundError:
            pass
    stream = client.responses.create(model=MODEL, input="Count.", background=True, max_output_tokens=3000, stream=True)
    for event in stream:
        if event.type == "response.created":
            running = event.response.id
        if event.type == "response.output_text.delta":
            break
    stream.close()
    assert client.responses.cancel(running).status == "cancelled"
    assert client.responses.retrieve(running).status == "cancelled"


def idempotency():
    """A request that is sent again with its key is done once."""
    for arguments in [{}, {"background": True}, {"store": False}]:
        twice = [
            client.responses.create(
                model=MODEL, input="Hi", max_output_tokens=4, extra_headers={"Idempotency-Key": f"key {arguments}"}, **arguments
            )
            for _ in range(2)
        ]
        assert twice[0].id == twice[1].id, twice
    try:
        client.responses.create(model=MODEL, input="Bye", extra_headers={"Idempotency-Key": "key {}"})
        raise AssertionError("accepted")
    except openai.BadRequestError as error:
        assert error.code == "idempotency_key_reused", error


def batches():
    body = {"model": MODEL, "messages": HI, "max_tokens": 4, "temperature": 0}
    rows = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(5)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("rows.jsonl", lines), purpose="batch")
    assert file.bytes == len(lines) and file.filename == "rows.jsonl" and file.expires_at > file.created_at, file
    assert client.files.retrieve(file.id) == file and file.id in [found.id for found in client.files.list(purpose="batch")]
    assert client.files.content(file.id).read() == lines
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    assert client.files.delete(file.id).deleted
    while batch.status not in ("completed", "failed"):
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.request_counts.completed == 5 and not batch.error_file_id, batch
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {row["custom_id"] for row in rows}
    plain = client.chat.completions.create(**body)
    text = answers[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert text == plain.choices[0].message.content, (text, plain)
    assert batch.id in [found.id for found in client.batches.list(limit=1)]
    assert client.batches.cancel(batch.id).status == "completed"


def message_batches():
    params = {"model": MODEL, "max_tokens": 4, "messages": HI}
    requests = [{"custom_id": f"r{i}", "params": params} for i in range(3)]
    requests.append({"custom_id": "wrong", "params": {**params, "messages": []}})
    batch = claude.messages.batches.create(requests=requests)
    assert batch.processing_status == "in_progress" and batch.request_counts.processing == 4, batch
    while batch.processing_status != "ended":
        time.sleep(0.05)
        batch = claude.messages.batches.retrieve(batch.id)
    assert batch.request_counts.succeeded == 3 and batch.request_counts.errored == 1 and batch.ended_at, batch
    results = {line.custom_id: line.result for line in claude.messages.batches.results(batch.id)}
    assert set(results) == {request["custom_id"] for request in requests}
    assert results["r0"].type == "succeeded" and results["r0"].message.content[0].type == "text", results
    assert results["wrong"].type == "errored" and results["wrong"].error.error.type == "invalid_request_error", results
    assert batch.id in [found.id for found in claude.messages.batches.list(limit=1)]
    assert claude.messages.batches.cancel(batch.id).processing_status == "ended"
    assert claude.messages.batches.delete(batch.id).type == "message_batch_deleted"
    try:
        claude.messages.batches.retrieve(batch.id)
        raise AssertionError("found")
    except anthropic.NotFoundError as error:
        assert error.request_id.startswith("req_"), error


def webhooks():
    """What a webhook is told, as the official client's `unwrap` takes it."""
    heard = queue.Queue()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.put((self.rfile.read(int(self.headers["content-length"])), dict(self.headers)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    receiver = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{receiver.server_port}/"
    endpoint = client.webhooks.create(name="ours", url=url, event_types=["response.incomplete", "batch.completed"])
    assert endpoint.id in [found.id for found in client.webhooks.list()]
    assert client.webhooks.retrieve(endpoint.id).url == url
    started = client.responses.create(model=MODEL, input="Count.", background=True, max_output_tokens=1)
    body, headers = heard.get(timeout=600)
    event = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
    assert event.type == "response.incomplete" and event.data.id == started.id, event
    assert client.responses.retrieve(started.id).status == "incomplete"
    try:
        client.webhooks.unwrap(body + b" ", headers, secret=endpoint.signing_secret)
        raise AssertionError("taken")
    except openai.InvalidWebhookSignatureError:
        pass
    assert client.webhooks.test(endpoint.id, event_type="batch.completed").status_code == 200
    body, headers = heard.get(timeout=600)
    assert client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret).type == "batch.completed"
    rotated = client.webhooks.rotate_secret(endpoint.id)
    assert rotated.signing_secret != endpoint.signing_secret
    assert client.webhooks.update(endpoint.id, name="theirs").name == "theirs"
    assert client.webhooks.delete(endpoint.id).deleted
    receiver.shutdown()


if __name__ == "__main__":
    for check in [
        models, chat, structured, completions, responses, open_responses_events, messages, tools, errors,
        documents_realtime, documents_async, documents_windows, stored, idempotency, batches, message_batches,
        webhooks,
    ]:
        check()
        print(f"ok {check.__name__}", flush=True)
