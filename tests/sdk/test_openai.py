"""The official OpenAI SDK for Python against a pod: sync and async.

Knows what the SDK promises its users. Must not know how quotum keeps it. The invariant
it keeps: what the pod charged is what the stub says was used, wherever it can know.
"""

import asyncio
import json
import os
import unittest
import uuid

import openai

from pod import CREDENTIAL, LIMIT, SHORT_MS, Pod, until

MESSAGES = [{"role": "user", "content": "How many words are in a word?"}]
TOOL = {
    "name": "count_words",
    "description": "Counts words.",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
}
CHAT_TOOL = {"type": "function", "function": TOOL}
RESPONSES_TOOL = {"type": "function", **TOOL}


class WithPod(unittest.TestCase):
    """Checks of one pod, which they share and use one after the other."""

    @classmethod
    def setUpClass(cls):
        cls.pod = Pod(os.environ["QUOTUM"])
        cls.addClassCleanup(cls.pod.end)
        cls.client = cls.make()

    @classmethod
    def make(cls, kind=openai.OpenAI, base="/v1", **options):
        """Returns a client that remembers every answer's status and headers in `seen`."""
        seen = []

        def note(response):
            seen.append((response.status_code, response.headers))

        async def note_async(response):
            note(response)

        is_async = "Async" in kind.__name__
        module = __import__(kind.__module__.partition(".")[0])
        http = module.DefaultAsyncHttpxClient if is_async else module.DefaultHttpxClient
        http_client = http(event_hooks={"response": [note_async if is_async else note]})
        client = kind(base_url=cls.pod.proxy + base, http_client=http_client, **{"api_key": CREDENTIAL, **options})
        client.seen = seen
        return client

    def setUp(self):
        self.ident = uuid.uuid4().hex
        self.headers = {"x-stub-id": self.ident}

    def with_headers(self, **headers):
        return self.headers | {f"x-stub-{name.replace('_', '-')}": str(value) for name, value in headers.items()}

    def actual(self):
        """Returns what the stub says the request used."""
        record = self.pod.record(self.ident)
        return record["prompt_tokens"] + record["completion_tokens"]

    def charging(self, deployment="wide"):
        return Charging(self, deployment)

    def attempts(self, client, count, status):
        self.assertEqual([seen for seen, _ in client.seen], [status] * count)


    def came_when_told(self, refused):
        """Checks that the SDK waited for the next window, by what the pod and the stub saw."""
        first, *early = [float(headers["retry-after-ms"]) for headers in refused]
        self.assertLessEqual(first, SHORT_MS)
        # Clocks are a few milliseconds apart: who comes too early is told by how little.
        self.assertTrue(all(left <= 20 for left in early), early)
        windows = [record["arrived_unix_ms"] // SHORT_MS for record in self.pod.records(self.ident)]
        self.assertEqual(len(set(windows)), len(windows))


class Charging:
    """What is done inside is charged with what it used, and with one request."""

    def __init__(self, test, deployment):
        self.test, self.deployment = test, deployment

    def counts(self):
        pod = self.test.pod
        return pod.charged(self.deployment), pod.charged(self.deployment, "requests")

    def __enter__(self):
        self.before = self.counts()

    def __exit__(self, kind, error, trace):
        if kind is None:
            tokens, requests = (after - before for before, after in zip(self.before, self.counts()))
            self.test.assertEqual((tokens, requests), (self.test.actual(), 1))


class Answers(WithPod):
    def test_chat(self):
        with self.charging():
            answer = self.client.chat.completions.create(model="wide", messages=MESSAGES, extra_headers=self.headers)
        self.assertEqual(answer.usage.total_tokens, self.actual())
        self.assertEqual(answer.choices[0].message.content.count("word"), answer.usage.completion_tokens)

    def test_a_chat_in_a_stream_hides_the_usage_nobody_asked_for(self):
        with self.charging():
            stream = self.client.chat.completions.create(
                model="wide", messages=MESSAGES, stream=True, extra_headers=self.headers
            )
            chunks = list(stream)
        self.assertTrue(all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks))
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text.count("word"), self.pod.record(self.ident)["completion_tokens"])

    def test_a_chat_in_a_stream_with_usage(self):
        with self.charging():
            stream = self.client.chat.completions.create(
                model="wide",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=self.headers,
            )
            chunks = list(stream)
        self.assertEqual((chunks[-1].choices, chunks[-1].usage.total_tokens), ([], self.actual()))

    def test_the_stream_helper_of_chats(self):
        with self.charging(), self.client.chat.completions.stream(
            model="wide", messages=MESSAGES, extra_headers=self.headers
        ) as stream:
            answer = stream.get_final_completion()
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_tools_in_a_chat(self):
        asked = dict(model="wide", tools=[CHAT_TOOL], extra_headers=self.headers)
        with self.charging():
            answer = self.client.chat.completions.create(messages=MESSAGES, **asked)
        choice = answer.choices[0]
        (call,) = choice.message.tool_calls
        self.assertEqual((choice.finish_reason, call.function.name), ("tool_calls", "count_words"))
        text = json.loads(call.function.arguments)["text"]
        self.ident = asked["extra_headers"]["x-stub-id"] = self.ident + "-result"
        result = {"role": "tool", "tool_call_id": call.id, "content": str(len(text.split()))}
        with self.charging():
            answer = self.client.chat.completions.create(
                messages=[*MESSAGES, choice.message.model_dump(exclude_none=True), result], **asked
            )
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_tools_in_a_stream_of_chat(self):
        with self.charging(), self.client.chat.completions.stream(
            model="wide", messages=MESSAGES, tools=[CHAT_TOOL], extra_headers=self.headers
        ) as stream:
            answer = stream.get_final_completion()
        (call,) = answer.choices[0].message.tool_calls
        words = json.loads(call.function.arguments)["text"].split()
        self.assertEqual(len(words), self.pod.record(self.ident)["completion_tokens"])

    def test_responses(self):
        with self.charging():
            answer = self.client.responses.create(model="wide", input="How many?", extra_headers=self.headers)
        self.assertEqual(answer.usage.total_tokens, self.actual())
        self.assertEqual(answer.output_text.count("word"), answer.usage.output_tokens)

    def test_responses_in_a_stream(self):
        with self.charging(), self.client.responses.stream(
            model="wide", input="How many?", extra_headers=self.headers
        ) as stream:
            kinds = [event.type for event in stream]
            answer = stream.get_final_response()
        self.assertEqual((kinds[0], kinds[-1]), ("response.created", "response.completed"))
        self.assertEqual(answer.usage.total_tokens, self.actual())

    def test_tools_in_responses(self):
        asked = dict(model="wide", input=MESSAGES, tools=[RESPONSES_TOOL], extra_headers=self.headers)
        with self.charging():
            answer = self.client.responses.create(**asked)
        (call,) = answer.output
        self.assertEqual((call.type, call.name), ("function_call", "count_words"))
        self.ident = self.headers["x-stub-id"] = self.ident + "-stream"
        with self.charging(), self.client.responses.stream(**asked) as stream:
            (call,) = stream.get_final_response().output
        self.assertIn("word", json.loads(call.arguments)["text"])

    def test_embeddings(self):
        with self.charging():
            answer = self.client.embeddings.create(model="wide", input=["one", "two"], extra_headers=self.headers)
        self.assertEqual([item.embedding for item in answer.data], [[0.5, -0.5]] * 2)

    def test_completions(self):
        asked = dict(model="wide", prompt="Count", max_tokens=20, extra_headers=self.headers)
        with self.charging():
            answer = self.client.completions.create(**asked)
        self.assertEqual(answer.usage.total_tokens, self.actual())
        self.ident = self.headers["x-stub-id"] = self.ident + "-stream"
        with self.charging():
            chunks = list(self.client.completions.create(stream=True, **asked))
        self.assertTrue(all(chunk.choices and chunk.usage is None for chunk in chunks))

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], ["paced", "small", "wide"])
        self.assertEqual(self.client.models.retrieve("wide").id, "wide")

    def test_the_headers_say_where_the_limits_stand(self):
        raw = self.client.chat.completions.with_raw_response.create(
            model="wide", messages=MESSAGES, max_tokens=5, extra_headers=self.headers
        )
        self.assertEqual(raw.headers["x-ratelimit-limit-tokens"], str(LIMIT))
        self.assertIn(int(raw.headers["x-ratelimit-remaining-tokens"]), range(LIMIT))
        self.assertEqual(raw.headers["x-ratelimit-limit-requests"], "10000")
        self.assertIn(int(raw.headers["x-ratelimit-remaining-requests"]), range(10_000))
        self.assertRegex(raw.headers["x-ratelimit-reset-tokens"], r"^[0-9.]+m?s$")


class Async(WithPod):
    def test_many_at_a_time(self):
        before = self.pod.charged("wide")

        async def ask(client, number):
            headers = {"x-stub-id": f"{self.ident}-{number}"}
            asked = dict(model="wide", messages=MESSAGES, extra_headers=headers)
            if number % 2:
                return (await client.chat.completions.create(**asked)).choices[0].message.content
            stream = await client.chat.completions.create(stream=True, **asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def all_of_them():
            async with self.make(openai.AsyncOpenAI) as client:
                return await asyncio.gather(*(ask(client, number) for number in range(20)))

        texts = asyncio.run(all_of_them())
        records = [self.pod.record(f"{self.ident}-{number}") for number in range(20)]
        self.assertEqual([text.count("word") for text in texts], [r["completion_tokens"] for r in records])
        actual = sum(record["prompt_tokens"] + record["completion_tokens"] for record in records)
        self.assertEqual(self.pod.charged("wide") - before, actual)

    def test_a_stream_that_is_closed_is_settled_with_what_came(self):
        before = self.pod.charged("wide")
        headers = self.with_headers(completion_tokens=800, body_ms=4_000)

        async def read_a_little():
            async with self.make(openai.AsyncOpenAI) as client:
                stream = await client.chat.completions.create(
                    model="wide", messages=MESSAGES, max_tokens=5_000, stream=True, extra_headers=headers
                )
                async for chunk in stream:
                    if chunk.choices[0].delta.content:
                        break
                reserved = self.pod.charged("wide") - before
                await stream.close()
                return reserved

        reserved = asyncio.run(read_a_little())
        self.assertGreater(reserved, 5_000)
        charged = until(lambda: (now := self.pod.charged("wide") - before) < reserved and now, "the settlement")
        # At least what left the upstream, and not what was not even generated.
        self.assertGreaterEqual(charged, self.actual())
        self.assertLess(charged, reserved - 800)


class Errors(WithPod):
    def refused(self, error, client=None, **changes):
        client = client or self.make(max_retries=0)
        asked = dict(model="wide", messages=MESSAGES, extra_headers=self.headers) | changes
        with self.assertRaises(error) as raised:
            client.chat.completions.create(**asked)
        return raised.exception

    def test_a_wrong_parameter_is_named(self):
        error = self.refused(openai.BadRequestError, max_tokens="many")
        self.assertEqual((error.param, error.type), ("max_tokens", "invalid_request_error"))
        self.assertEqual(self.pod.records(self.ident), [])

    def test_a_wrong_credential(self):
        error = self.refused(openai.AuthenticationError, self.make(api_key="sk-wrong"))
        self.assertEqual(error.code, "invalid_api_key")

    def test_an_unknown_model(self):
        error = self.refused(openai.NotFoundError, model="none")
        self.assertEqual((error.param, error.code), ("model", "model_not_found"))

    def test_what_is_refused_until_the_window_ends(self):
        client = self.make(max_retries=0)
        headers = self.with_headers(completion_tokens=900)
        spend = dict(model="small", messages=MESSAGES, max_tokens=900, extra_headers=headers)
        with self.assertRaises(openai.RateLimitError) as raised:
            # Twice is too much for one window; the third time there is no new one.
            for _ in range(3):
                client.chat.completions.create(**spend)
        error = raised.exception
        self.assertEqual((error.status_code, error.type, error.code), (429, "tokens", "rate_limit_exceeded"))
        self.assertRegex(error.message, r"Limit 1000, Used \d+, Requested \d+\. Please try again in [0-9.]+m?s\.$")
        headers = error.response.headers
        self.assertEqual(headers["x-quotum-refused-by"], "quotum")
        self.assertLess(0, float(headers["retry-after-ms"]))
        self.assertLessEqual(float(headers["retry-after-ms"]), 1_000 * float(headers["retry-after"]))
        admitted = [status for status, _ in client.seen if status == 200]
        self.assertEqual(len(self.pod.records(self.ident)), len(admitted))

    def test_what_never_fits_is_not_tried_again(self):
        client = self.make()
        self.assertGreater(client.max_retries, 0)
        error = self.refused(openai.RateLimitError, client, model="small", max_tokens=2_000)
        self.assertEqual((error.type, error.code), ("tokens", "rate_limit_exceeded"))
        self.assertIn("Request too large", error.message)
        self.attempts(client, 1, 429)
        self.assertEqual(self.pod.records(self.ident), [])

    def test_an_upstream_that_fails_is_tried_again_by_the_sdk(self):
        client = self.make(max_retries=1)
        error = self.refused(openai.InternalServerError, client, extra_headers=self.with_headers(fault="500"))
        self.assertEqual(error.status_code, 500)
        self.attempts(client, 2, 500)
        self.assertEqual(len(self.pod.records(self.ident)), 2)

    def test_an_upstream_that_refuses_the_request_is_not(self):
        client, before = self.make(), self.pod.charged("wide")
        self.refused(openai.BadRequestError, client, extra_headers=self.with_headers(fault="400"))
        self.attempts(client, 1, 400)
        self.assertEqual(self.pod.charged("wide"), before)

    def test_a_stream_that_is_cut_raises(self):
        headers = self.with_headers(fault="cut", completion_tokens=80)
        for create, asked in [
            (self.client.chat.completions.create, {"messages": MESSAGES}),
            (self.client.completions.create, {"prompt": "Count"}),
        ]:
            stream = create(model="wide", stream=True, extra_headers=headers, **asked)
            with self.assertRaises(openai.APIError) as raised:
                list(stream)
            self.assertEqual(raised.exception.code, "upstream_cut")

    def test_a_response_that_is_cut_says_so(self):
        headers = self.with_headers(fault="cut", completion_tokens=80)
        stream = self.client.responses.create(model="wide", input="How many?", stream=True, extra_headers=headers)
        events = []
        with self.assertRaises(openai.APIError):
            for event in stream:
                events.append(event)
        self.assertEqual((events[-1].type, events[-1].code), ("error", "upstream_cut"))


class Retries(WithPod):
    def test_the_sdk_comes_back_when_it_was_told_to(self):
        # A second request may just fall into the next window: then nothing is refused.
        for _ in range(5):
            client = self.make(max_retries=3)
            for _ in range(2):
                client.chat.completions.create(model="paced", messages=MESSAGES, extra_headers=self.headers)
            refused = [headers for status, headers in client.seen if status == 429]
            if refused:
                break
        self.assertEqual([status for status, _ in client.seen[-2:]], [429, 200])
        self.came_when_told(refused)


if __name__ == "__main__":
    unittest.main(verbosity=2)
