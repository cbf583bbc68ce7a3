// The reader works here, so that the page stays alive while it does.
import { openReader } from './reader.js';

const said = error => ({ code: error.code ?? 'internal_error', message: error.message, hint: error.hint ?? '' });
const reader = openReader(new URL('./', import.meta.url), share => postMessage({ share })).then(r => { postMessage({ ready: true }); return r; });
reader.catch(error => postMessage({ broken: said(error) }));

onmessage = async ({ data: { id, bytes } }) => {
  try {
    const { square, ...answer } = await (await reader).read(bytes);
    postMessage({ id, answer }, [answer.film.pixels.buffer]);
  } catch (error) { postMessage({ id, error: said(error) }); }
};
