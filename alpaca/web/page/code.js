// The request just made as curl, as Python with the openai client, and as JSON.

// Inside single quotes a POSIX shell changes nothing; a quote itself is written '\''.
export const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// JSON strings, numbers and lists are also Python literals.
const literal = (value) => JSON.stringify(value);

const OWN = ["top_k", "repetition_penalty"]; // not in OpenAI's API: its client takes them as extra_body

// A person sends texts: one user message where that gives the same prompt, else the rendered prompt.
function readable({ instruction, prompt, body }) {
  const { prompt: _ids, stream: _stream, stream_options: _options, model, ...values } = body;
  return prompt.chat
    ? { path: "chat/completions", body: { model, messages: [{ role: "user", content: instruction }], ...values } }
    : { path: "completions", body: { model, prompt: prompt.text, ...values } };
}

export function asCurl(made, key) {
  const { path, body } = readable(made);
  return [
    `curl -s ${location.origin}/v1/${path}`,
    `-H ${shellQuote("Content-Type: application/json")}`,
    ...(key ? ['-H "Authorization: Bearer $ALPACA_API_KEY"'] : []),
    `-d ${shellQuote(asJson({ body }))}`,
  ].join(" \\\n  ");
}

export function asPython(made, key) {
  const { path, body } = readable(made);
  const named = Object.entries(body).filter(([name]) => !OWN.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => OWN.includes(name)));
  const values = [...named, ...(Object.keys(extra).length ? [["extra_body", extra]] : [])];
  const [call, text] = path === "completions" ? ["completions", "text"] : ["chat.completions", "message.content"];
  return [
    ...(key ? ["import os", ""] : []),
    "from openai import OpenAI  # pip install openai",
    "",
    `client = OpenAI(base_url=${literal(`${location.origin}/v1`)}, ` +
      `api_key=${key ? 'os.environ["ALPACA_API_KEY"]' : '"none"'})`,
    `answer = client.${call}.create(`,
    ...values.map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
    `print(*(choice.${text} for choice in answer.choices), sep="\\n\\n")`,
  ].join("\n");
}

// One line a key: hundreds of token ids would otherwise take a line each.
export function asJson({ body }) {
  const lines = Object.entries(body).map(([name, value]) => `  ${literal(name)}: ${literal(value)}`);
  return `{\n${lines.join(",\n")}\n}`;
}
