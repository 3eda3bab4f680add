// The npm clients against a server: node agent.mjs ADDRESS, in a folder whose node_modules has them. Prints an object of
// what was found wrong, by client and feature.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const Town = z.object({ city: z.enum(["Bonn", "Oslo"]), days: z.union([z.literal(1), z.literal(2)]) });
const messages = [{ role: "user", content: "Where to?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Bonn", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const failed = {};

async function feature(name, run) {
  try {
    if (!(await run())) failed[name] = "it gave something else";
  } catch (error) {
    failed[name] = String(error).slice(0, 300);
  }
}

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = { model: "tiny", messages, temperature: 1, seed: 4, max_tokens: 900 };
await feature("openai chat and stream", async () => {
  const short = { model: "tiny", messages, max_tokens: 12 };
  const whole = await client.chat.completions.create(short);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...short, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  return text === whole.choices[0].message.content;
});
await feature("openai tools", async () => {
  const whole = await client.chat.completions.create({ ...asked, tools, tool_choice: "required" });
  return whole.choices[0].message.tool_calls.every((call) => JSON.parse(call.function.arguments).city);
});
await feature("openai parse", async () => {
  const whole = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Town, "town") });
  return Town.parse(whole.choices[0].message.parsed);
});
await feature("openai responses", async () => {
  const whole = await client.responses.create({ model: "tiny", input: "Where to?", max_output_tokens: 12 });
  return whole.output_text.length > 0;
});

const providers = {
  "ai-sdk default (responses)": createOpenAI({ baseURL, apiKey: "none" })("tiny"),
  "ai-sdk chat": createOpenAI({ baseURL, apiKey: "none" }).chat("tiny"),
  "ai-sdk compatible": createOpenAICompatible({ name: "longspec", baseURL, supportsStructuredOutputs: true })("tiny"),
};
for (const [name, model] of Object.entries(providers)) {
  const own = { model, prompt: "Where to?", maxRetries: 0, temperature: 1, maxOutputTokens: 900 };
  await feature(`${name}: text and stream`, async () => {
    const short = { ...own, maxOutputTokens: 12, temperature: 0 };
    const whole = await generateText(short);
    let text = "";
    for await (const piece of streamText(short).textStream) text += piece;
    return whole.text.length > 0 && text === whole.text;
  });
  await feature(`${name}: generateObject`, async () => Town.parse((await generateObject({ ...own, schema: Town })).object));
  await feature(`${name}: tools`, async () => {
    const weather = tool({ description: "The weather", inputSchema: Town, execute: async () => "wet" });
    const whole = await generateText({ ...own, tools: { weather }, toolChoice: "required" });
    return whole.toolCalls.length > 0 && whole.toolCalls.every((call) => Town.parse(call.input));
  });
}
console.log(JSON.stringify(failed));
