// Ask a route for its JSON, once or again and again while the page is seen.

// The body of the answer; an Error in the words of the server where it refuses, with `status`.
export async function ask(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const { where, expected, got, do: next } = body.error ?? {};
  const text = expected ? `${where}: expected ${expected}, got ${got}${next ? `. Next: ${next}` : ""}` : `the server answered ${response.status}`;
  throw Object.assign(new Error(text), { status: response.status });
}

export function post(url, body) {
  return ask(url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
}

// Ask now and every `seconds` until `signal` aborts; nothing while the page is hidden. `draw(body)`, `fail(error)`.
export function poll(url, seconds, signal, draw, fail) {
  let timer = 0;
  const turn = async () => {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        const body = await ask(typeof url === "function" ? url() : url, { signal });
        if (!signal.aborted) draw(body);
      } catch (error) {
        if (!signal.aborted) fail(error);
      }
    }
    if (!signal.aborted) timer = setTimeout(turn, 1000 * seconds);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  document.addEventListener("visibilitychange", () => !document.hidden && turn(), { signal });
  turn();
  return turn;
}
