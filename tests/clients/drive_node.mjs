// JavaScript's clients: openai's, and Vercel's AI SDK with its provider for OpenAI-compatible servers.
//
//   npm install openai ai @ai-sdk/openai-compatible zod     (in a folder of their own, from which this is run)
//   node --input-type=module - http://127.0.0.1:2242 [KEY] < tests/clients/drive_node.mjs
//
// A line a check; ends with 1 if one failed.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, jsonSchema, Output, streamText, tool } from 'ai';
import OpenAI from 'openai';

const [url, key = 'none'] = process.argv.slice(2);
const question = 'Name a city by the sea.';
const form = {
  type: 'object',
  properties: { city: { enum: ['Oslo', 'Rome'] } },
  required: ['city'],
  additionalProperties: false,
};
const weather = { type: 'function', function: { name: 'get_weather', description: 'The weather.', parameters: form } };
let failed = 0;

async function check(label, work) {
  try {
    await work();
    console.log(`ok  ${label}`);
  } catch (error) {
    failed += 1;
    console.log(`BAD ${label}: ${String(error?.stack ?? error).slice(0, 800)}`);
  }
}

function require(condition, ...seen) {
  if (!condition) throw new Error(`unexpected: ${JSON.stringify(seen)}`);
}

async function openaiChecks() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
  const model = (await client.models.list()).data[0].id;
  const common = { model, messages: [{ role: 'user', content: question }], max_completion_tokens: 60, seed: 3 };
  await check('openai: a stream is the whole answer', async () => {
    const whole = await client.chat.completions.create(common);
    let text = '';
    for await (const chunk of await client.chat.completions.create({ ...common, stream: true, min_p: 0 }))
      text += chunk.choices[0]?.delta?.content ?? '';
    require(text === whole.choices[0].message.content, text, whole);
  });
  await check('openai: a tool demanded, by its stream helper', async () => {
    const runner = client.chat.completions.stream({ ...common, tools: [weather], tool_choice: 'required' });
    const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
    require(['Oslo', 'Rome'].includes(JSON.parse(call.function.arguments).city), call);
  });
  await check('openai: a response', async () => {
    const response = await client.responses.create({ model, input: question, max_output_tokens: 16 });
    require(response.output_text, response);
  });
  await check('openai: embeddings', async () => {
    const made = await client.embeddings.create({ model, input: ['The sea', 'A hill'] });
    require(made.data.length === 2 && made.data[0].embedding.length > 8, made.data.length);
  });
  await check('openai: an unknown model', async () => {
    const error = await client.chat.completions.create({ ...common, model: 'nobody' }).catch((reason) => reason);
    require(error instanceof OpenAI.NotFoundError && error.code === 'model_not_found', error);
  });
  return model;
}

async function vercelChecks(name) {
  const server = createOpenAICompatible({
    name: 'aphrodite',
    baseURL: `${url}/v1`,
    apiKey: key,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const model = server(name);
  const common = { model, prompt: question, maxOutputTokens: 60, seed: 3, maxRetries: 0 };
  await check('ai: a stream is the whole answer, with usage', async () => {
    const whole = await generateText(common);
    const result = streamText(common);
    let text = '';
    for await (const piece of result.textStream) text += piece;
    require(text === whole.text && (await result.usage).outputTokens > 0, text, whole.text);
  });
  await check('ai: a tool, its result, and an answer', async () => {
    const tools = {
      get_weather: tool({ description: 'The weather.', inputSchema: jsonSchema(form), execute: async () => 'Rain' }),
    };
    const result = await generateText({ ...common, tools, toolChoice: 'required' });
    require(['Oslo', 'Rome'].includes(result.toolCalls[0].input.city), result.toolCalls);
    const messages = [{ role: 'user', content: question }, ...result.response.messages];
    await generateText({ ...common, prompt: undefined, messages, tools });
  });
  await check('ai: an object of a schema, streamed', async () => {
    const result = streamText({ ...common, output: Output.object({ schema: jsonSchema(form) }) });
    let last;
    for await (const part of result.partialOutputStream) last = part;
    require(['Oslo', 'Rome'].includes(last.city), last);
  });
  await check('ai: samplers as provider options', async () => {
    await generateText({ ...common, providerOptions: { aphrodite: { min_p: 0.1, dry_multiplier: 0.8 } } });
  });
  await check('ai: embeddings', async () => {
    const made = await embedMany({ model: server.textEmbeddingModel(name), values: ['The sea', 'A hill'] });
    require(made.embeddings.length === 2, made.embeddings.length);
  });
}

await vercelChecks(await openaiChecks());
process.exit(Number(failed > 0));
