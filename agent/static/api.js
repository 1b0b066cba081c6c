// @ts-check
/** The API's documentation: drawn from /openapi.json, with a way to try each request. */

const { SwaggerUIBundle } = /** @type {{SwaggerUIBundle: (options: object) => void}} */ (/** @type {unknown} */ (window));
SwaggerUIBundle({ url: '/openapi.json', domNode: document.querySelector('#api'), deepLinking: true, validatorUrl: null });
