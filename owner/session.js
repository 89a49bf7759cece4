/* Who is signed in, and the requests that are made in their name.
 *
 * Sign-in is Firebase's, over its REST API (identity toolkit: accounts:signInWithPassword and
 * accounts:sendOobCode; secure token: a refresh token for a new ID token, which is good for an
 * hour). The tokens are in memory and in this tab's sessionStorage, nowhere else.
 */

const STORE = "leflux owner";
const ENDED = "Your sign-in has ended. Please sign in again.";
const EARLY_MS = 60_000; // a token is renewed so long before its end

/** What went wrong, in words for people; errors has those that belong to a field, by its path. */
export class Failure extends Error {
  constructor(message, errors = {}, status = 0) {
    super(message);
    Object.assign(this, { errors, status });
  }
}

export let settings; // {apiKey, signInUrl, tokenUrl, publicUrl}
let tokens = null; // {idToken, refreshToken, expiresAt}
let renewal = null; // the promise of new tokens, while they are asked for
let whenOut = () => {};

function keep(newTokens) {
  tokens = newTokens;
  try {
    if (tokens) sessionStorage.setItem(STORE, JSON.stringify(tokens));
    else sessionStorage.removeItem(STORE);
  } catch { /* a browser without storage: for as long as the page is open */ }
}

/** Learn how to sign in, and who is signed in already; onOut(why) hears the end of it. */
export async function begin(onOut) {
  whenOut = onOut;
  const answer = await fetch("/owner/config.json");
  settings = await answer.json();
  try {
    tokens = JSON.parse(sessionStorage.getItem(STORE));
  } catch { /* nothing kept */ }
  return tokens !== null;
}

export function signOut(why = "") {
  keep(null);
  whenOut(why);
}

/** What the token says of its owner: {email, email_verified, user_id, …}. */
export function me() {
  const middle = tokens.idToken.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
  const bytes = Uint8Array.from(atob(middle), (letter) => letter.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(bytes));
}

// ---------------------------------------------------------------------------------------------
// Google's side. An error's message begins with a code, which may be followed by " : " and more.

const NO_MATCH = "E-mail address and password do not match.";
const SAID = { // code: the field that it is about, and words for it
  INVALID_LOGIN_CREDENTIALS: ["password", NO_MATCH],
  INVALID_PASSWORD: ["password", NO_MATCH],
  MISSING_PASSWORD: ["password", "Enter your password."],
  EMAIL_NOT_FOUND: ["email", "There is no account with this e-mail address."],
  INVALID_EMAIL: ["email", "This is no e-mail address."],
  MISSING_EMAIL: ["email", "Enter your e-mail address."],
  USER_DISABLED: ["email", "This account has been disabled."],
  TOO_MANY_ATTEMPTS_TRY_LATER: ["", "Too many attempts. Wait a while, or ask for a new password."],
  PASSWORD_LOGIN_DISABLED: ["", "Sign-in by e-mail and password is not turned on in Firebase."],
  OPERATION_NOT_ALLOWED: ["", "Sign-in by e-mail and password is not turned on in Firebase."],
};

async function google(url, body, type) {
  let answer;
  try {
    const headers = type ? { "Content-Type": type } : {};
    answer = await fetch(`${url}?key=${encodeURIComponent(settings.apiKey)}`,
      { method: "POST", body, headers, signal: AbortSignal.timeout(20_000) });
  } catch {
    throw new Failure("The sign-in service cannot be reached just now. Try again in a moment.");
  }
  const data = await answer.json().catch(() => ({}));
  if (answer.ok) return data;
  const message = String(data.error?.message ?? `status ${answer.status}`);
  const [field, words] = SAID[message.split(" : ")[0]]
    ?? ["", `The sign-in service refused: ${message}`];
  throw new Failure(words, field ? { [field]: words } : {}, answer.status);
}
const account = (call, body) =>
  google(`${settings.signInUrl}/accounts:${call}`, JSON.stringify(body), "application/json");
const until = (seconds) => Date.now() + Number(seconds) * 1000;

export async function signIn(email, password) {
  const found = await account("signInWithPassword", { email, password, returnSecureToken: true });
  if (!found.idToken) throw new Failure("Accounts with a second factor cannot sign in here.");
  const { idToken, refreshToken, expiresIn } = found;
  keep({ idToken, refreshToken, expiresAt: until(expiresIn) });
}

export const forgotten = (email) =>
  account("sendOobCode", { requestType: "PASSWORD_RESET", email });

/** Send a letter that proves the address: owners by e-mail are let in with a proven one only. */
export const prove = () =>
  account("sendOobCode", { requestType: "VERIFY_EMAIL", idToken: tokens.idToken });

async function askForNew() {
  const before = tokens;
  const wish = { grant_type: "refresh_token", refresh_token: before.refreshToken };
  let fresh;
  try {
    fresh = await google(settings.tokenUrl, new URLSearchParams(wish));
  } catch (failure) {
    if (failure.status < 400 || failure.status >= 500) throw failure;
    signOut(ENDED);
    throw new Failure(ENDED);
  }
  if (tokens !== before) return; // signed out meanwhile
  const { id_token: idToken, refresh_token: refreshToken, expires_in: expiresIn } = fresh;
  keep({ idToken, refreshToken, expiresAt: until(expiresIn) });
}
export function renew() {
  renewal ??= askForNew().finally(() => { renewal = null; });
  return renewal;
}

// ---------------------------------------------------------------------------------------------
// Our side.

function failureOf(method, status, body) {
  const { error, message = `The server answered ${status}.`, details = {} } = body;
  const errors = { ...details.errors };
  if (details.field) errors[details.field] = message;
  if (error === "host_taken") errors[method === "POST" ? "host" : "allowedHosts"] = message;
  return new Failure(message, errors, status);
}

/** Ask /api/admin/sites + path for JSON. With several processes behind a proxy, each site lives in
 * one of them, and the site's host says in which. */
export async function api(method, path = "", { host, body, signal } = {}) {
  const send = async () => {
    const headers = { Authorization: `Bearer ${tokens.idToken}` };
    if (host) headers["X-Leflux-Host"] = host;
    if (body) headers["Content-Type"] = "application/json";
    try {
      return await fetch(`/api/admin/sites${path}`,
        { method, headers, signal, body: body && JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached just now. Try again in a moment.");
    }
  };
  if (tokens && tokens.expiresAt - Date.now() < EARLY_MS) await renew();
  if (!tokens) throw new Failure("You are signed out.");
  let answer = await send();
  if (answer.status === 401 && tokens) {
    await renew(); // the clocks may differ
    if (tokens) answer = await send();
  }
  const data = await answer.json().catch(() => ({}));
  if (answer.status === 401) signOut(ENDED);
  if (!answer.ok) throw failureOf(method, answer.status, data);
  return data;
}
