"""Chat templates of the kinds that are in use, a tokenizer that knows their special tokens, and conversations for them.

Each template is written here twice in one: with its `generation` blocks it marks what the assistant wrote, which `transformers` reads, and
`unmarked` it is as most models have theirs.
"""

import re

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = """<unk> <s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <bos> <start_of_turn>
<end_of_turn> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>
<|user|> <|assistant|> <|endoftext|>""".split()
PLAIN_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens of their own, and not special


def unmarked(template):
    return re.sub(r"\{% (end)?generation %\}", "", template)


CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

LLAMA3 = """{{- '<|begin_of_text|>' -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls -%}
{% set function = m.tool_calls[0].function -%}
{% generation %}{{ '{"name": "' + function.name + '", "parameters": ' + function.arguments | tojson + '}<|eot_id|>' }}{% endgeneration %}
{%- elif m.role == 'assistant' -%}
{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}"""

DATED = LLAMA3.replace(
    "{{- '<|begin_of_text|>' -}}",
    "{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot_id|>' -}}",
)

MISTRAL = """{{- '<s>' -}}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] -%}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- elif m.tool_calls -%}
{% generation %}{{ '[TOOL_CALLS] ' + m.tool_calls | tojson + '</s>' }}{% endgeneration %}
{%- elif m.role == 'tool' -%}
{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- else -%}
{%- if loop.first or rest[loop.index0 - 1].role == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif -%}
{% generation %}{{ ' ' + m.content + '</s>' }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """{{- '<bos>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<end_of_turn>' }}{% endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}"""

QWEN3 = """{%- set asked = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}
{%- if loop.index0 > asked.last and (m.reasoning_content or loop.last) -%}
{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ ('\\n' if m.content or not loop.first else '') + '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

CHANNELS = """{%- set asked = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|start|>assistant' }}{% generation %}
{%- if m.reasoning_content and loop.index0 > asked.last -%}
{{ '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}
{%- endif -%}
{%- if m.tool_calls -%}
{{ '<|channel|>commentary to=' + m.tool_calls[0].function.name + '<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- else -%}
{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
{%- endif -%}
{% endgeneration %}
{%- else -%}
{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}"""

TRIMMING = """{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '<s>[INST] ' + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content | trim + ' </s>' }}{% endgeneration %}
{%- else %}{{ raise_exception('no such role') }}{% endif -%}
{%- endfor -%}"""

ENDED = """{%- for m in messages -%}
{{ ('<|user|>' if m.role == 'user' else '<|assistant|>') + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|end|>' }}{% endif -%}
{{ '\\n' }}
{%- endfor -%}
{{ '<|assistant|>\\n' if add_generation_prompt else '<|endoftext|>' }}"""

HEADINGS = """{%- for m in messages -%}
{{ '### ' + m.role + ':\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif -%}"""

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "dated": DATED, "mistral": MISTRAL, "gemma": GEMMA, "qwen3": QWEN3, "channels": CHANNELS,
    "trimming": TRIMMING, "ended": ENDED, "headings": HEADINGS,
}  # fmt: skip
NO_SYSTEM = ("gemma", "trimming")
WITH_TOOLS = ("llama3", "dated", "mistral", "qwen3", "channels")
THINKING = ("qwen3", "channels")


def write_chat_tokenizer(folder, template=None, pieces=False):
    """A BPE whose merges stand across the edges of turns, so that a boundary in the text need not be one of tokens.

    Of bytes, or of pieces of text with a blank before each part between special tokens, as SentencePiece has them.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if pieces else None))
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|[ ▁]?[^\s▁]+|[\s▁]+"), "isolated")
    steps = [split] if pieces else [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pieces:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        tokenizer.post_processor, tokenizer.decoder = processors.ByteLevel(trim_offsets=False), decoders.ByteLevel()
    alphabet = [] if pieces else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    text = 'assistant\n\n\nyes no maybe hello world user model: {"name": "look", "arguments": {}}\n\n the answer is 42.\n  \n'
    tokenizer.train_from_iterator([text] * 20, trainer)
    if pieces:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.add_tokens(PLAIN_ADDED)
    served = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if template:
        served.chat_template = template
    served.save_pretrained(folder)
    return str(folder)


WORDS = ["yes", "no", "hello", "world", "42.", "é", "😀", "a\nb", "{}", "x  y"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
blanks = st.sampled_from(["", " ", "\n", "\n\n"])
loose = st.tuples(blanks, words, blanks).map("".join)


@st.composite
def conversations(draw, name, texts=words):
    """Messages that template `name` takes: one to three questions, each with an answer, which may look something up first."""
    messages = []
    if name not in NO_SYSTEM and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    questions = draw(st.integers(1, 3))
    for question in range(1, questions + 1):
        messages.append({"role": "user", "content": draw(texts)})
        looks_up = name in WITH_TOOLS and draw(st.booleans())
        # Between question and answer these templates keep thoughts while they are at it, and drop them later: prompts then differ.
        thinks = name in THINKING and (question == questions or not looks_up) and draw(st.booleans())
        thought = {"reasoning_content": draw(words)} if thinks else {}
        if looks_up:
            call = {"type": "function", "function": {"name": "look", "arguments": {"at": draw(words)}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]} | thought)
            messages.append({"role": "tool", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)} | thought)
    return messages
