"""The official Anthropic SDK for Python against a pod: sync and async.

Knows what the SDK promises its users. Must not know how quotum keeps it. The invariant
it keeps: what the pod charged is what the stub says was used, the cache's tokens among
them.
"""

import asyncio
import unittest

import anthropic

from pod import until
from test_openai import MESSAGES, WithPod

TOOL = {
    "name": "count_words",
    "description": "Counts words.",
    "input_schema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
}


class WithAnthropic(WithPod):
    @classmethod
    def make(cls, kind=anthropic.Anthropic, **options):
        return super().make(kind, base="", **options)

    def asked(self, **changes):
        asked = dict(model="wide", max_tokens=100, messages=MESSAGES, extra_headers=self.headers)
        return asked | changes


class Answers(WithAnthropic):
    def test_messages(self):
        with self.charging():
            answer = self.client.messages.create(**self.asked())
        self.assertEqual(answer.usage.input_tokens + answer.usage.output_tokens, self.actual())
        self.assertEqual(answer.content[0].text.count("word"), answer.usage.output_tokens)

    def test_messages_in_a_stream(self):
        with self.charging(), self.client.messages.stream(**self.asked(system="Count.")) as stream:
            text = "".join(stream.text_stream)
            answer = stream.get_final_message()
        self.assertEqual(answer.usage.input_tokens + answer.usage.output_tokens, self.actual())
        self.assertEqual((answer.stop_reason, text.count("word")), ("end_turn", answer.usage.output_tokens))

    def test_raw_events(self):
        with self.charging():
            events = list(self.client.messages.create(stream=True, **self.asked()))
        self.assertEqual((events[0].type, events[-1].type), ("message_start", "message_stop"))

    def test_tokens_of_the_cache_are_charged(self):
        headers = self.with_headers(prompt_tokens=40, cached_tokens=30)
        with self.charging():
            answer = self.client.messages.create(**self.asked(extra_headers=headers))
        self.assertEqual((answer.usage.input_tokens, answer.usage.cache_read_input_tokens), (10, 30))

    def test_tools(self):
        with self.charging():
            answer = self.client.messages.create(**self.asked(tools=[TOOL]))
        (call,) = answer.content
        self.assertEqual((answer.stop_reason, call.type, call.name), ("tool_use", "tool_use", "count_words"))
        words = len(call.input["text"].split())
        self.ident = self.headers["x-stub-id"] = self.ident + "-result"
        said = {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": str(words)}
        messages = [*MESSAGES, said, {"role": "user", "content": [result]}]
        with self.charging():
            answer = self.client.messages.create(**self.asked(tools=[TOOL], messages=messages))
        self.assertEqual((answer.stop_reason, answer.content[0].type), ("end_turn", "text"))

    def test_tools_in_a_stream(self):
        with self.charging(), self.client.messages.stream(**self.asked(tools=[TOOL])) as stream:
            (call,) = stream.get_final_message().content
        self.assertEqual(len(call.input["text"].split()), self.pod.record(self.ident)["completion_tokens"])

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], ["paced", "small", "wide"])

    def test_the_headers_say_where_the_limits_stand(self):
        raw = self.client.messages.with_raw_response.create(**self.asked())
        for unit in ("tokens", "requests"):
            limit = int(raw.headers[f"anthropic-ratelimit-{unit}-limit"])
            self.assertIn(int(raw.headers[f"anthropic-ratelimit-{unit}-remaining"]), range(limit))
            self.assertRegex(raw.headers[f"anthropic-ratelimit-{unit}-reset"], r"^\d{4}-\d\d-\d\dT[0-9:.]+Z$")


class Async(WithAnthropic):
    def test_many_at_a_time(self):
        before = self.pod.charged()

        async def ask(client, number):
            asked = self.asked(extra_headers={"x-stub-id": f"{self.ident}-{number}"})
            if number % 2:
                return await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                return await stream.get_final_message()

        async def all_of_them():
            async with self.make(kind=anthropic.AsyncAnthropic) as client:
                return await asyncio.gather(*(ask(client, number) for number in range(20)))

        answers = asyncio.run(all_of_them())
        actual = sum(answer.usage.input_tokens + answer.usage.output_tokens for answer in answers)
        self.assertEqual(self.pod.charged() - before, actual)

    def test_a_stream_that_is_closed_is_settled_with_what_came(self):
        before = self.pod.charged()
        headers = self.with_headers(completion_tokens=800, body_ms=4_000)

        async def read_a_little():
            async with self.make(kind=anthropic.AsyncAnthropic) as client:
                asked = self.asked(max_tokens=5_000, extra_headers=headers)
                async with client.messages.stream(**asked) as stream:
                    async for _ in stream.text_stream:
                        return self.pod.charged() - before

        reserved = asyncio.run(read_a_little())
        self.assertGreater(reserved, 5_000)
        charged = until(lambda: (now := self.pod.charged() - before) < reserved and now, "the settlement")
        self.assertGreaterEqual(charged, self.actual())
        self.assertLess(charged, reserved - 800)


class Errors(WithAnthropic):
    def refused(self, error, client=None, **changes):
        client = client or self.make(max_retries=0)
        with self.assertRaises(error) as raised:
            client.messages.create(**self.asked(**changes))
        return raised.exception

    def kind(self, error):
        self.assertEqual(error.body["type"], "error")
        return error.body["error"]["type"]

    def test_a_wrong_parameter_is_named(self):
        error = self.refused(anthropic.BadRequestError, messages=[])
        self.assertEqual(self.kind(error), "invalid_request_error")
        self.assertIn("messages: at least one message is required", error.message)
        self.assertEqual(self.pod.records(self.ident), [])

    def test_a_wrong_credential(self):
        error = self.refused(anthropic.AuthenticationError, self.make(api_key="sk-wrong"))
        self.assertEqual(self.kind(error), "authentication_error")

    def test_an_unknown_model(self):
        self.assertEqual(self.kind(self.refused(anthropic.NotFoundError, model="none")), "not_found_error")

    def test_what_is_refused_until_the_window_ends(self):
        client = self.make(max_retries=0)
        spend = self.asked(model="small", max_tokens=900, extra_headers=self.with_headers(completion_tokens=900))
        with self.assertRaises(anthropic.RateLimitError) as raised:
            for _ in range(3):
                client.messages.create(**spend)
        error = raised.exception
        self.assertEqual((error.status_code, self.kind(error)), (429, "rate_limit_error"))
        self.assertGreater(float(error.response.headers["retry-after-ms"]), 0)
        self.assertEqual(error.response.headers["x-quotum-refused-by"], "quotum")

    def test_what_never_fits_is_not_tried_again(self):
        client = self.make()
        self.assertGreater(client.max_retries, 0)
        error = self.refused(anthropic.APIStatusError, client, model="small", max_tokens=2_000)
        self.assertEqual((error.status_code, self.kind(error)), (413, "request_too_large"))
        self.attempts(client, 1, 413)
        self.assertEqual(self.pod.records(self.ident), [])

    def test_an_overloaded_upstream_is_tried_again_by_the_sdk(self):
        client = self.make(max_retries=1)
        error = self.refused(anthropic.InternalServerError, client, extra_headers=self.with_headers(fault="500"))
        self.assertEqual(error.status_code, 500)
        self.attempts(client, 2, 500)

    def test_a_stream_that_is_cut_raises(self):
        headers = self.with_headers(fault="cut", completion_tokens=80)
        with self.assertRaises(anthropic.APIStatusError) as raised:
            list(self.client.messages.create(stream=True, **self.asked(extra_headers=headers)))
        self.assertEqual(self.kind(raised.exception), "api_error")


class Retries(WithAnthropic):
    def test_the_sdk_comes_back_when_it_was_told_to(self):
        for _ in range(5):
            client = self.make(max_retries=3)
            for _ in range(2):
                # One request a window: the second of them is refused at first.
                client.messages.create(**self.asked(model="paced"))
            refused = [headers for status, headers in client.seen if status == 429]
            if refused:
                break
        self.assertEqual([status for status, _ in client.seen[-2:]], [429, 200])
        self.came_when_told(refused)


if __name__ == "__main__":
    unittest.main(verbosity=2)
