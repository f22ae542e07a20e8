"""The start page, the API's documentation page and the OpenAPI document; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aphrodite.server.context import ServerContext

if TYPE_CHECKING:
    from aphrodite.server.app import Application

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
pre,code{font:14px/1.4 ui-monospace,monospace}
pre{padding:1rem;overflow-x:auto;background:#8882;border-radius:6px}
details{border:1px solid #8886;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}
summary b{display:inline-block;min-width:3.5rem}
table{border-collapse:collapse;width:100%}
td{vertical-align:top;padding:.25rem .5rem;border-top:1px solid #8884}
td:nth-child(2){white-space:nowrap;opacity:.75}
"""

_HOME = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Aphrodite Engine</title>
<meta name="viewport" content="width=device-width"><style>%(style)s</style></head><body>
<h1>Aphrodite Engine</h1>
<p>This is a server for a language model. Programs talk to it over OpenAI's HTTP API; <a href="docs">docs</a> lists
its endpoints and every field. Try it:</p>
<pre>curl %(url)s/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Write the first line of a story."}], "max_tokens": 60}'</pre>
<p>If the server was started with keys, add <code>-H 'Authorization: Bearer KEY'</code>.</p>
</body></html>
"""

_SCRIPT = """
const el=(tag,text,...kids)=>{
  const e=document.createElement(tag);if(text)e.textContent=text;e.append(...kids);return e};
const kind=s=>!s?'':s.$ref?'object':s.enum?s.enum.join(' | ')
  :s.anyOf?s.anyOf.map(kind).filter(k=>k&&k!='null').join(' | ')
  :s.type=='array'?'list of '+(kind(s.items)||'anything'):s.type||'';
const fields=(schema,doc)=>{const table=el('table');
  for(const [name,s] of Object.entries(schema.properties||{})){
    const row=el('tr','',el('td','',el('code',name)),el('td',kind(s)),el('td',s.description||''));
    table.append(row);
    if(s.default!==undefined&&s.default!==null&&typeof s.default!='object')
      row.lastChild.append(' Default: '+s.default+'.');
  }return table};
async function show(){
  const main=document.getElementById('api'),key=document.getElementById('key').value;
  main.replaceChildren();
  const answer=await fetch('openapi.json',{headers:key?{Authorization:'Bearer '+key}:{}});
  if(!answer.ok){main.append(el('p',answer.status==401?'This server wants an API key.':'Error '+answer.status));return}
  const doc=await answer.json();
  for(const [path,item] of Object.entries(doc.paths))for(const [method,op] of Object.entries(item)){
    const part=el('details','',el('summary','',el('b',method.toUpperCase()),el('code',path),' '+op.summary));
    const body=op.requestBody;
    if(body){const ref=body.content['application/json'].schema.$ref.split('/').pop();
      part.append(fields(doc.components.schemas[ref],doc))}
    main.append(part)}
}
document.getElementById('form').addEventListener('submit',e=>{e.preventDefault();show()});
show();
"""

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Aphrodite Engine: API</title>
<meta name="viewport" content="width=device-width"><style>%(style)s</style></head><body>
<h1>Aphrodite Engine: API</h1>
<form id="form"><input id="key" type="password" placeholder="API key, if any" autocomplete="off"> <button>Show</button>
 <a href="openapi.json">openapi.json</a></form><main id="api"></main><script>%(script)s</script></body></html>
"""

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class DocumentationEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._document: bytes | None = None

    async def home(self, request: Request) -> Response:
        """What this server is and a line to try it."""
        config = self._context.config
        # The Host header has passed the allow-list, so it is a name of this server.
        url = f"http://{request.headers.get('host', '')}{config.root_path}"
        return _page(_HOME % {"style": _STYLE, "url": html.escape(url)})

    async def page(self, request: Request) -> Response:
        """This documentation."""
        return _page(_PAGE % {"style": _STYLE, "script": _SCRIPT})

    async def openapi(self, request: Request) -> Response:
        """The API as an OpenAPI 3.1 document."""
        if self._document is None:
            from aphrodite.server.openapi import openapi_document

            app: Application = request.app
            self._document = msgspec.json.encode(openapi_document(app.routes, self._context.config.root_path))
        return Response(self._document, media_type="application/json")


def _page(text: str) -> Response:
    return Response(text, media_type="text/html", headers=_PAGE_HEADERS)
