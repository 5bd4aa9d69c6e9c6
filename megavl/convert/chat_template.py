"""The chat template of exports; it gives the same text as the released conversation format.

Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/utils/conversation.py` (template "deepseek").
"""

from __future__ import annotations

import json

from megavl.config.chat import SYSTEM_PROMPT

_BOS = "{{- bos_token -}}\n"
_TEMPLATE = """\
{%- set eos = @EOS@ -%}
{%- set image = @IMAGE@ -%}
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part['type'] == 'image' -%}
        {{- image -}}
      {%- elif part['type'] == 'text' -%}
        {%- if not loop.first and content[loop.index0 - 1]['type'] == 'text' -%}{{- ' ' -}}{%- endif -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] | lower == 'system' -%}
  {%- set system = body(messages[0]['content']).lstrip() -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = @SYSTEM@ -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if system -%}{{- system + '\\n\\n' -}}{%- endif -%}
{%- for message in turns -%}
  {%- set text = body(message['content']) | trim -%}
  {{- (message['role'] | capitalize) + ':' -}}
  {%- if text -%}
    {{- ' ' + text -}}
    {%- if message['role'] | lower == 'assistant' -%}
      {{- eos -}}
    {%- elif add_generation_prompt or not loop.last -%}
      {{- '\\n\\n' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def chat_template(*, eos_token: str, image_token: str, system: str = SYSTEM_PROMPT, bos: bool = False) -> str:
    """Jinja source of the template.

    EOS closes every assistant answer, the last one too, so that the template also renders training text. A leading
    system message replaces `system`; an empty one removes it.

    Args:
        bos: the text begins with BOS. Clients of language models tokenize it without special tokens; the processors of
            DeepSeek-VL put BOS first themselves.
    """
    literals = {"@EOS@": eos_token, "@IMAGE@": image_token, "@SYSTEM@": system.lstrip()}
    template = _BOS + _TEMPLATE if bos else _TEMPLATE
    for mark, value in literals.items():
        # A JSON string is a valid Jinja literal of the same value. In ASCII an emoji would become two surrogates.
        template = template.replace(mark, json.dumps(value, ensure_ascii=False))
    return template
