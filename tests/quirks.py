"""Small templates, one for each habit that real ones have, over the tiny tokenizer of the tests."""

from __future__ import annotations

TURNS = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
QUIRKS = {
    "as it stands": TURNS + PROMPT,
    "tools": "{% if tools %}<|start|>{{ tools | map(attribute='function.name') | join(' ') }}<|end|>\n{% endif %}"
    + TURNS.replace("{{ m.content }}", "{{ m.content }}" + CALLS) + PROMPT,
    "trims": TURNS.replace("m.content", "m.content | trim") + PROMPT,
    "refuses system, must alternate": ALTERNATE + TURNS + PROMPT,
    "default system": "{% if messages[0].role != 'system' %}<|start|>system\nYou help.<|end|>\n{% endif %}"
    + TURNS + PROMPT,
    "date": "<|start|>{{ strftime_now('%d %b %Y') }}<|end|>\n" + TURNS + PROMPT,
    "cuts earlier thoughts": TURNS.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] | trim }}"
        "{% else %}{{ m.content }}{% endif %}",
    ) + PROMPT,
    "empty thought for the last answer": TURNS.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}",
    ) + PROMPT,
    "prompt opens a thought": TURNS.replace("m.content", "m.content.split('</think>')[-1]")
    + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
    "last turn ends otherwise": TURNS.replace(
        "<|end|>", "{{ '</s>' if loop.last and m.role[0] == 'a' else '<|end|>' }}")
    + PROMPT,
    "more behind the last turn": TURNS + PROMPT.replace("{% endif %}", "{% else %}</s>{% endif %}"),
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    + PROMPT.replace("<|start|>assistant\n", "assistant:"),
    "counts the turns": "{{ messages | length }}" + TURNS + PROMPT,
    "system in the last question": "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}\n"
    "{% if s and m.role == 'user' and (loop.last or loop.index0 == loop.length - 2) %}{{ s }}\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}" + PROMPT,
    "no generation prompt": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}<|start|>{{ m.content }}<|end|>{% endif %}{% endfor %}",
    "markers": "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + PROMPT,
}  # fmt: skip
