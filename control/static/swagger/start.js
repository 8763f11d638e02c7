"use strict";
// Everything comes from this host: the page's Content-Security-Policy allows nothing else.
window.addEventListener("load", () => {
  SwaggerUIBundle({
    url: "/docs/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    persistAuthorization: false,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis],
  });
});
