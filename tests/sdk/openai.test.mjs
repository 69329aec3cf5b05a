// The official OpenAI SDK for Node against a pod whose addresses are in the environment.
//
// Knows what the SDK promises its users. Must not know how quotum keeps it. The invariant
// it keeps: what the pod charged is what the stub says was used.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";

import OpenAI from "openai";

const { PROXY, ADMIN, STUB, CREDENTIAL, SHORT_MS } = process.env;
const messages = [{ role: "user", content: "How many words are in a word?" }];
const parameters = { type: "object", properties: { text: { type: "string" } }, required: ["text"] };
const tool = { name: "count_words", description: "Counts words.", parameters };

// Returns a client that remembers every answer's status and headers in `seen`.
function make(options = {}) {
  const seen = [];
  const noted = async (url, request) => {
    const answer = await fetch(url, request);
    seen.push({ status: answer.status, headers: answer.headers });
    return answer;
  };
  const client = new OpenAI({ baseURL: PROXY + "/v1", apiKey: CREDENTIAL, fetch: noted, ...options });
  return Object.assign(client, { seen });
}

const get = async (url) => (await fetch(url)).json();

async function until(look, what) {
  const end = Date.now() + 30_000;
  for (;;) {
    const seen = await look();
    if (seen) return seen;
    assert.ok(Date.now() < end, `waited in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

async function charged() {
  const { limits } = await get(ADMIN + "/status");
  const quotas = limits.find((limit) => limit.deployments.includes("wide")).quotas;
  const tokens = quotas.find((quota) => quota.unit === "tokens");
  return tokens.admitted_total - tokens.refunded_total + tokens.overshoot_total;
}

const records = async (id) => (await get(STUB + "/_ledger")).filter((record) => record.id === id);

async function actual(id) {
  const ended = async () => {
    const [record] = await records(id);
    return record?.completion_tokens == null ? null : record;
  };
  const record = await until(ended, `the end of ${id}`);
  return record.prompt_tokens + record.completion_tokens;
}

// What `ask` does is charged with what it used.
async function charging(ask) {
  const id = randomUUID();
  const before = await charged();
  const answer = await ask({ headers: { "x-stub-id": id } });
  assert.equal((await charged()) - before, await actual(id));
  return answer;
}

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

const client = make();

test("chat", async () => {
  const ask = (options) => client.chat.completions.create({ model: "wide", messages }, options);
  const { choices, usage } = await charging(ask);
  assert.equal(choices[0].message.content.trim().split(" ").length, usage.completion_tokens);
});

test("a chat in a stream hides the usage nobody asked for", async () => {
  const asked = { model: "wide", messages, stream: true };
  const chunks = await charging(async (options) => all(await client.chat.completions.create(asked, options)));
  assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && !chunk.usage));
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
});

test("a chat in a stream with usage", async () => {
  const asked = { model: "wide", messages, stream: true, stream_options: { include_usage: true } };
  const chunks = await charging(async (options) => all(await client.chat.completions.create(asked, options)));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.ok(chunks.at(-1).usage.total_tokens > 0);
});

test("tools in a chat, whole and in a stream", async () => {
  const asked = { model: "wide", messages, tools: [{ type: "function", function: tool }] };
  const whole = await charging((options) => client.chat.completions.create(asked, options));
  const streamed = await charging((options) => client.chat.completions.stream(asked, options).finalChatCompletion());
  for (const { choices } of [whole, streamed]) {
    assert.equal(choices[0].finish_reason, "tool_calls");
    const [call] = choices[0].message.tool_calls;
    assert.equal(call.function.name, "count_words");
    assert.match(JSON.parse(call.function.arguments).text, /^(word )+$/);
  }
});

test("responses, whole and in a stream, in words and with tools", async () => {
  for (const tools of [[], [{ type: "function", strict: false, ...tool }]]) {
    const asked = { model: "wide", input: messages, tools };
    const whole = await charging((options) => client.responses.create(asked, options));
    const streamed = await charging((options) => client.responses.stream(asked, options).finalResponse());
    for (const { output, usage } of [whole, streamed]) {
      assert.equal(output[0].type, tools.length ? "function_call" : "message");
      assert.ok(usage.total_tokens > 0);
    }
  }
});

test("embeddings", async () => {
  const asked = { model: "wide", input: ["one", "two"] };
  const { data } = await charging((options) => client.embeddings.create(asked, options));
  assert.deepEqual(data.map(({ embedding }) => [...embedding]), [[0.5, -0.5], [0.5, -0.5]]);
});

test("completions, whole and in a stream", async () => {
  const asked = { model: "wide", prompt: "Count", max_tokens: 20 };
  await charging((options) => client.completions.create(asked, options));
  const stream = { ...asked, stream: true };
  const chunks = await charging(async (options) => all(await client.completions.create(stream, options)));
  assert.ok(chunks.every((chunk) => chunk.choices.length === 1));
});

test("models", async () => {
  assert.deepEqual((await all(client.models.list())).map((model) => model.id), ["paced", "small", "wide"]);
});

// Returns the error of an ask, and the client that got it.
async function refused(kind, asked, { options = {}, headers = {} } = {}) {
  const client = make(options);
  const failed = client.chat.completions.create({ model: "wide", messages, ...asked }, { headers });
  const error = await failed.then(() => assert.fail("it was answered"), (error) => error);
  assert.ok(error instanceof kind, `${error}`);
  return { error, attempts: client.seen.length };
}

test("errors that the caller has to mend", async () => {
  const { error } = await refused(OpenAI.BadRequestError, { max_tokens: "many" });
  assert.equal(error.param, "max_tokens");
  const wrong = await refused(OpenAI.AuthenticationError, {}, { options: { apiKey: "sk-wrong" } });
  assert.deepEqual([wrong.error.code, wrong.attempts], ["invalid_api_key", 1]);
  const unknown = await refused(OpenAI.NotFoundError, { model: "none" });
  assert.equal(unknown.error.code, "model_not_found");
});

test("what never fits is not tried again", async () => {
  const { error, attempts } = await refused(OpenAI.RateLimitError, { model: "small", max_tokens: 2_000 });
  assert.deepEqual([error.type, error.code, attempts], ["tokens", "rate_limit_exceeded", 1]);
  assert.match(error.message, /Request too large/);
});

test("an upstream that fails is tried again by the SDK", async () => {
  const failing = { options: { maxRetries: 1 }, headers: { "x-stub-fault": "500" } };
  assert.equal((await refused(OpenAI.InternalServerError, {}, failing)).attempts, 2);
});

test("a stream that is cut throws", async () => {
  const headers = { "x-stub-fault": "cut", "x-stub-completion-tokens": "80" };
  const stream = await client.chat.completions.create({ model: "wide", messages, stream: true }, { headers });
  await assert.rejects(all(stream), (error) => error instanceof OpenAI.APIError && error.code === "upstream_cut");
});

test("a stream that is aborted is settled with what came", async () => {
  const id = randomUUID();
  const before = await charged();
  const headers = { "x-stub-id": id, "x-stub-completion-tokens": "800", "x-stub-body-ms": "4000" };
  const asked = { model: "wide", messages, stream: true, max_tokens: 5_000 };
  const stream = await client.chat.completions.create(asked, { headers });
  let reserved;
  for await (const chunk of stream) {
    if (!chunk.choices[0].delta.content) continue;
    reserved = (await charged()) - before;
    break;
  }
  assert.ok(reserved > 5_000);
  const less = async () => {
    const now = (await charged()) - before;
    return now < reserved && now;
  };
  const settled = await until(less, "the settlement");
  assert.ok((await actual(id)) <= settled && settled < reserved - 800, `${settled} of ${reserved}`);
});

test("the SDK comes back when it was told to", async () => {
  const id = randomUUID();
  const headers = { "x-stub-id": id };
  let statuses;
  let refused = [];
  // A second request may just fall into the next window: then nothing is refused.
  for (let round = 0; round < 5 && !refused.length; round += 1) {
    const client = make({ maxRetries: 3 });
    for (let i = 0; i < 2; i += 1) await client.chat.completions.create({ model: "paced", messages }, { headers });
    statuses = client.seen.map(({ status }) => status);
    refused = client.seen.filter(({ status }) => status === 429);
  }
  assert.deepEqual(statuses.slice(-2), [429, 200]);
  const [first, ...early] = refused.map(({ headers }) => Number(headers.get("retry-after-ms")));
  assert.ok(first <= Number(SHORT_MS));
  // Clocks are a few milliseconds apart: who comes too early is told by how little.
  assert.ok(early.every((left) => left <= 20), `${early}`);
  const windows = (await records(id)).map((record) => Math.floor(record.arrived_unix_ms / Number(SHORT_MS)));
  assert.equal(new Set(windows).size, windows.length);
});
