"""Short chat templates of the kinds that models are published with, and a tokenizer for each.

Each keeps what is particular about its family, and leaves out the rest.
"""

# ruff: noqa: E501 - a template's line is one text

from __future__ import annotations

import re

CHATML_LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)  # fmt: skip
LAST_QUERY = "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
SPLIT_THOUGHT = (
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN_TURN = (
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
)
DEEPSEEK = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.s }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
HARMONY = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt "
    "else '<|end|>' }}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}<|assistant|>"
    "\n<think>{{ thought if loop.last else '' }}</think>\n{{ m.content.strip() }}"
    "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)
APERTUS = (
    "{{ bos_token }}{% set ns = namespace(open=false) %}{% for m in messages %}{% if ns.open and m.role != 'assistant' %}<|assistant_end|>"
    "{% set ns.open = false %}{% endif %}{% if m.role == 'assistant' %}{% if not ns.open %}<|assistant_start|>{% set ns.open = true %}"
    "{% endif %}{{ m.content }}{% else %}<|{{ m.role }}_start|>{{ m.content }}<|{{ m.role }}_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.s if loop.last or loop.index0 >= messages|length - 2 else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
MINIMAX = (
    LAST_QUERY
    + "{% for m in messages %}{% if m.role == 'assistant' %}]~b]ai\n{% if m.reasoning_content and loop.index0 > ns.q %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}[e~[\n{% elif m.role == 'user' or loop.first %}]~b]{{ m.role }}\n"
    "{{ m.content }}[e~[\n{% endif %}{% endfor %}{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
QWEN3 = (
    TOOLS + LAST_QUERY + "{% for m in messages %}" + QWEN_TURN + SPLIT_THOUGHT + "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.q and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ content.lstrip('\n') }}"
    + CALLS + "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
QWEN35 = (
    LAST_QUERY
    + "{% for m in messages %}"
    + QWEN_TURN
    + SPLIT_THOUGHT
    + "<|im_start|>assistant\n{% if loop.index0 > ns.q %}<think>\n"
    "{{ thought.strip() }}\n</think>\n\n{% endif %}{{ content | trim }}" + CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
COMMAND = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.tool_calls %}"
    "<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|><|START_ACTION|>{{ m.tool_calls | tojson }}<|END_ACTION|>"
    "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>\n{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
LLAMA3 = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    + TOOLS + "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{\"name\": \"{{ m.tool_calls[0].function.name }}\", \"parameters\": "
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT
)
TAGGED_WIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n<think>\n\n</think>\n{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + CHATML_PROMPT
)
TAGGED_PARTS = (
    TOOLS
    + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.tool_calls[0].function | tojson "
    "if m.tool_calls else '' }}{% endgeneration %}{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>\n"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATES = {  # name -> (template, end token of the tokenizer)
    "chatml": (CHATML_LOOP + CHATML_PROMPT, "<|im_end|>"),
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'system' %}"
        "<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}", "</s>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen-2.5": (TOOLS + "{% for m in messages %}" + QWEN_TURN + "<|im_start|>assistant\n{{ m.content }}" + CALLS +
                 "<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT, "<|im_end|>"),
    "qwen-3": (QWEN3, "<|im_end|>"),
    "qwen-3.5": (QWEN35, "<|im_end|>"),
    "r1-distill": (DEEPSEEK, "<|eos|>"),
    "qwq": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", "<|im_end|>"),
    "gemma-2": (ALTERNATE + "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
                "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "<eos>"),
    "gemma-4": ("{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
                "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>"
                "{% endif %}{% endif %}", "<turn|>"),
    "phi-3": (PHI + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}", "<|endoftext|>"),
    "phi-4": ("{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}", "<|im_end|>"),
    "glm-4": (GLM, "<|endoftext|>"),
    "apertus": (APERTUS, "<|assistant_end|>"),
    "harmony": (HARMONY, "<|return|>"),
    "command-r7b": (COMMAND, "<|END_OF_TURN_TOKEN|>"),
    "minimax-m2": (MINIMAX, "[e~["),
    "granite": ("{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}", "<|end_of_text|>"),
    "olmo": ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
             "{% if not loop.last or m.role != 'assistant' %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
             "<|endoftext|>"),
    "zephyr": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "</s>"),
    "vicuna": ("{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% else %}{{ m.role | upper }}: "
               "{{ m.content | trim }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}", "</s>"),
    "no-end": ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
               "{% if add_generation_prompt %}### assistant:\n{% endif %}", "</s>"),
    "smollm-3": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}"
                 "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}"
                 "<think>\n\n</think>\n{% endif %}{% endif %}", "<|im_end|>"),
    "tagged": (TAGGED, "<|im_end|>"),
    "tagged-wide": (TAGGED_WIDE, "<|im_end|>"),
    "tagged-parts": (TAGGED_PARTS, "<|endoftext|>"),
    "asks-after-questions": (CHATML_LOOP + CHATML_PROMPT.replace("prompt %}", "prompt and messages[-1].role != 'assistant' %}", 1),
                             "<|im_end|>"),
    "closed-before-header": (  # Command R7B with tools: the prompt closes a thought that no dialogue has
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>"
        "{{ m.content }}<|END_RESPONSE|>{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>"),
    "closed-by-header": (  # DeepSeek-V3.2: a header closes a thought that the prompt opens and closes
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|></think>{{ m.content }}<|eos|>{% else %}"
        "<|User|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think></think>{% endif %}", "<|eos|>"),
    "continues": ("{{ bos_token }}{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'assistant' %}{% if ns.last != 'assistant' %}"
                  "<|turn>model\n{% endif %}{{ m.content | trim }}{% if loop.last or messages[loop.index].role != 'assistant' %}<turn|>{% endif %}\n"
                  "{% else %}<|turn>{{ m.role }}\n{{ m.content | trim }}<turn|>\n{% endif %}{% set ns.last = m.role %}{% endfor %}"
                  "{% if add_generation_prompt %}<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
                  "<turn|>"),
    "system-before-last": ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
                           "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
                           "{% endif %}{% endfor %}", "</s>"),
    "tagged-no-end": ("{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {% generation %}{{ m.content }} {% endgeneration %}{% else %}"
                      "USER: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}", "</s>"),
    "reminder-last": (  # Command R+ with tools: what to write stands behind the last message
        "{{ bos_token }}{% for m in messages %}<|TURN|><|{{ m.role | upper }}|>{{ m.content }}{% if m.tool_calls %}"
        "Action: {{ m.tool_calls | tojson }}{% else %}<|END|>{% endif %}{% endfor %}<|TURN|><|SYSTEM|>Write 'Action:' first<|END|>"
        "{% if add_generation_prompt %}<|TURN|><|ASSISTANT|>{% endif %}", "<|END|>"),
    "no-header": ("{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}", "</s>"),
    "ends-before-next": (  # Hunyuan 3: the last answer has no end token, and none is asked for behind an answer
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|><think></think>{{ m.content }}"
        "{% if not loop.last %}{{ eos_token }}{% endif %}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|assistant|><think></think>{% endif %}", "<|eos|>"),
    "system-before-last-tools": (  # Mistral with tools: it says how to call them in the last question
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[TOOLS]{{ tools | tojson }}[/TOOLS][INST] "
        "{% if loop.last and tools %}Call in one array. {% endif %}{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS]"
        "{{ m.tool_calls | tojson }}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", "</s>"),
    "cuts-at-think": (  # GLM-4.7: what stands before </think> is a thought, and both are written side by side
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and '</think>' in m.content %}<think>"
        "{{ m.content.split('</think>')[0] }}</think>{{ m.content.split('</think>')[1] }}{% elif m.role == 'assistant' %}<think></think>"
        "{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
        "<|user|>"),
    "gemma-4-thoughts": ("{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.reasoning_content %}"
                         "<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}{{ m.content | trim }}<turn|>\n{% endfor %}"
                         "{% if add_generation_prompt %}<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
                         "<turn|>"),
    "system-when-asked": (  # Muse: a system text stands there where an answer is asked for, and an answer says to whom it goes
        "{{ bos_token }}{% if add_generation_prompt and messages[0].role != 'system' %}<|start|>system<|message|>Be helpful.<|eot|>{% endif %}"
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %} to={% if m.tool_calls %}tool<|message|>"
        "{{ m.tool_calls | tojson }}{% else %}user<|message|>{% endif %}{% else %}<|message|>{% endif %}{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}", "<|eot|>"),
    "spaces-differ": (  # Granite 20B: a header has a space that the one of calls has not
        "{% for m in messages %}{% if m.tool_calls %}ASSISTANT:\n<function_call> {{ m.tool_calls | tojson }}{{ eos_token }}\n"
        "{% elif m.role == 'assistant' %}ASSISTANT: \n{{ m.content }}{{ eos_token }}\n{% else %}{{ m.role | upper }}: {{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: \n{% endif %}", "<|endoftext|>"),
    "opens-after-a-line": ("{% for m in messages %}<|turn>{{ m.role }}\n{% if m.reasoning_content %}\n<think>\n{{ m.reasoning_content }}\n</think>\n\n"
                           "{% endif %}{{ m.content }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>assistant\n<think>\n{% endif %}",
                           "<turn|>"),
    "content-parts": ("{% for m in messages %}{{ m.role | capitalize }}:{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% endif %}"
                      "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}", "<end_of_utterance>"),
    "first-system-only": ("{% for m in messages %}{% if m.role != 'system' or loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                          "{% endif %}{% endfor %}" + CHATML_PROMPT, "<|im_end|>"),
    "calls-as-json": ("{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{{ m.tool_calls[0].function.name + ' ' + "
                      "m.tool_calls[0].function.arguments }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                      "{% endif %}{% endfor %}" + CHATML_PROMPT, "<|im_end|>"),
}  # fmt: skip
TOKEN = re.compile(r"<\|[^<>\s{}]{1,30}\|>|<[a-z_/|]{1,20}\|?>|\[/?[A-Za-z]{4,}\]|\]~b\]|\[e~\[|<\|turn>|<\|channel>")
TEXT_TOKENS = re.compile("think|tool|response")  # added, but not special
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 and Qwen cut text
ROLES = ("system", "user", "assistant", "tool")
MERGES = [("Ċ", "Ċ"), ("h", "i"), ("Ġ", "hi"), ("Ġ", "a"), ("Ġ", "Ġ"), (":", "Ċ"), ("t", "h")]


def tokenizer_for(name: str):
    """Return a byte-level tokenizer with a few merges, and with the template's own tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, eos = TEMPLATES[name]
    vocab = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>")
    spread = "".join(template.replace("{{ m.role }}", role) for role in ROLES)
    spread += "".join(template.replace("{{ m.role | upper }}", role.upper()) for role in ROLES)
    tokens = [token for token in dict.fromkeys(TOKEN.findall(spread)) if token not in (eos, "<s>")]
    fast.add_special_tokens({"additional_special_tokens": [t for t in tokens if not TEXT_TOKENS.search(t)]})
    fast.add_tokens([t for t in tokens if TEXT_TOKENS.search(t)])
    fast.chat_template = template
    return fast
