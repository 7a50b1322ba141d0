// Requests to the server, and its errors in plain words.

export class ServerError extends Error {}

// What happened and what to do, by HTTP status; the server's own message follows.
const ADVICE = {
  401: "The server asks for a key. Reload the page to enter it.",
  404: "The server does not have what was asked for. Reload the page.",
  413: "The request is too large.",
  429: "The server is busy with other requests.",
  503: "The server is not ready.",
};

function describe(status, message, retryAfter) {
  const advice = ADVICE[status] ?? (status >= 500 ? "The server failed." : "The server refused the request.");
  const wait = status === 429 ? ` Try again ${retryAfter ? `in ${retryAfter} s` : "in a moment"}.` : "";
  return `${advice}${wait}${message ? ` It says: ${message}` : ` (HTTP status ${status})`}`;
}

async function errorOf(response) {
  const body = await response.json().catch(() => ({})); // a proxy in between may answer HTML
  return new ServerError(describe(response.status, body?.error?.message, response.headers.get("Retry-After")));
}

async function request(path, options) {
  const lost = "The server cannot be reached. Check that it is running, then try again.";
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new ServerError(lost);
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

export const getJson = async (path) => (await request(path, { cache: "no-store" })).json();

export const postJson = async (path, body, signal) => (await request(path, asJson(body, signal))).json();

// Server-sent events end with a line break; a chunk of the network may end anywhere.
async function* eventData(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// Yields the chunks of a completion, and raises unless the server ends it with [DONE].
export async function* streamAnswer(path, body, signal) {
  const response = await request(path, asJson(body, signal));
  try {
    for await (const data of eventData(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The server stopped this answer. It says: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  if (signal.aborted) throw new DOMException("stopped", "AbortError");
  throw new ServerError("The connection was lost before the answer was complete. Ask again.");
}
