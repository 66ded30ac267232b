"""Writes cases.json: small chat templates with the output or the error of transformers.

    pip install transformers==4.57.6 jinja2 && python text/tests/jinja/make_cases.py

Templates are compiled with the function that `apply_chat_template` uses, and all are rendered with the same variables.
"""

import json
import pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGES = [
    {"role": "user", "content": 'a "<b>" é'},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1.0, "b": [True, None], "a": "it's"}}}]},
    {"role": "tool", "tool_call_id": "c1", "name": "f", "content": [{"type": "text", "text": "é\n\t\u0001"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {
    "x": {"type": "number"}, "b": {"type": "array"}}, "required": ["x"]}}}]
VARIABLES = {
    "messages": MESSAGES, "tools": TOOLS, "no_tools": None, "add_generation_prompt": True, "bos_token": "<s>",
    "n": 7, "f": 2.5, "s": "  Hello World  ", "d": {"b": 1, "a": {"z": None, "y": 2.0}}, "l": [3, 1, 2], "empty": [],
    "text": "one two three", "nested": [[1, 2], [3]], "yes": True, "no": False, "words": ["b", "A", "c"],
    "people": [{"name": "ann", "age": 3}, {"name": "Bob", "age": 1}, {"name": "cid", "age": 3}],
}

# Expressions whose values are printed.
EXPRESSIONS = """
1|1.0|1e30|1e16|1e15|123456789012345678|0.1|1e-5|0.0001|1.5e-7|-0.0|1e22|100000.0|3.14159|2.0e5
true|false|none|True|False|None|yes|no|no_tools|undefined_name
(1, 2)|(1,)|()|1, 2|(1)|((1, 2), 3)|('a', "b")|[(1, 2)]|(1, [2, (3,)])|{'a': (1, 2)}|(1, 2) + (3,)|(1, 2) * 2
[1, 2]|[]|['a', 'b']|["it's"]|['say "x"']|['it\\'s "x"']|['a\\nb\\t\\\\']|['é', '\\u0001']|[true, none, 1.0]|[[1], [2]]
{}|{'a': 1}|{'b': 1, 'a': [true, none]}|{1: 2}|{'a': {'b': 'c'}}|d|l|words|people[0]|messages[1]|nested
'abc'[::-1]|'abc'[1:]|'abc'[:-1]|'abc'[-2:]|'abc'[::2]|'abcdef'[4:1:-1]|'abcdef'[-1:-4:-1]|'abc'[5:]|'abc'[2:1]|'abc'[-10:2]
l[::-1]|l[1:]|l[:1]|l[-1]|l[0]|l[-2:]|l[::2]|empty[::-1]|empty[1:]|l[5:]|(1, 2, 3)[1:]|(1, 2, 3)[::-1]|l[:0][::-1]|l[-1:0:-1]
l[2:0:-1]|l[10::-1]|'abc'[10::-1]|'abc'[:10:-1]|''[::-1]|messages[1:][::-1] | length|messages[::-1][0].role
'abc'[0]|'abc'[-1]|'abc'[7]|l[7]|d['b']|d['zz']|d.b|d.zz|d['a']['y']|d.a.y|d.get('b')|d.get('zz')|d.get('zz', 5)
1 + 2|1 - 2|2 * 3|7 / 2|4 / 2|7 // 2|-7 // 2|7 % 3|-7 % 3|7 % -3|2 ** 3|2 ** -1|2 ** 0.5|7.5 // 2|-7.5 % 2|1 + 1.0|1.5 + 1.5|n / 7
'a' + 'b'|'a' ~ 'b'|'a' ~ 1|'a' ~ none|'a' ~ true ~ 1.0|1 ~ 2|'x' ~ [1, 'a']|'x' ~ undefined_name|'a' * 3|3 * 'a'|[1] * 2|[1] + [2]|2 * [0]
'%s' % 'a'|'%s-%s' % ('a', 1)|'%d' % 3|'%05.2f' % 3.14159|'%x' % 255|'%s' % none|'%s' % [1]|'%r' % 'a'|'%%' % ()|'%3d|' % 5|'%-5s|' % 'a'|'%(a)s' % {'a': 1}
'{}'.format(1)|'{} {}'.format('a', 'b')|'{1} {0}'.format('a', 'b')|'{a}'.format(a=1)|'{:.2f}'.format(3.14159)|'{:>5}'.format('a')|'{:05d}'.format(42)|'{!r}'.format('a')|'{{}}'.format()|'{:,}'.format(1234567)
1 < 2|1 < 2 < 3|3 > 2 > 2|1 == 1.0|'a' < 'b'|1 == '1'|'a' == "a"|[1] == [1]|(1,) == (1,)|none == none|true == 1|not true|not ''|not []|1 != 2|'a' < 'B'|[1, 2] < [1, 3]|(1, 2) == [1, 2]
1 in l|4 in l|4 not in l|'ell' in s|'b' in d|'zz' not in d|'a' in ['a']|none in [none]|'' in 'a'|'x' in ''|1 in (1, 2)|1 and 2|0 or 'x'|none or 'x'|'' and 1|1 if yes else 2|1 if no else 2|'' ~ (1 if no)
s.strip()|s.lstrip()|s.rstrip()|s.upper()|s.lower()|s.split()|text.split(' ')|text.split(' ', 1)|text.split('o')|text.rsplit(' ', 1)|text.title()|text.capitalize()|text.replace('o', '0')|text.replace('o', '0', 1)|text.startswith('one')|text.endswith('x')|text.find('two')|text.find('zz')|text.count('o')|text.index('two')
text.startswith(('a', 'one'))|text.partition(' ')|text.rpartition(' ')|'a-b'.split('-')[1]|','.join(['a', 'b'])|'ab'.join('xy')|'abc'.isalpha()|'12'.isdigit()|'a1'.isalnum()|' '.isspace()|'aB'.swapcase()|'a\\nb\\r\\nc'.splitlines()|'a'.center(5)|'a'.ljust(3) ~ '|'|'a'.rjust(3)|'7'.zfill(3)|'xxaxx'.strip('x')|'abc'.removeprefix('a')|'abc'.removesuffix('c')|'ABC'.islower()|'ABC'.isupper()|'a\\tb'.expandtabs(4)|'é'.encode('utf-8')|'abc'.lstrip('ab')|'<think>x</think>y'.split('</think>')[-1].lstrip('\\n')|'Ab'.casefold()|'12'.isnumeric()|'12'.isdecimal()|'x'.isidentifier()|'a b'.istitle()
d.items()|d.items() | list|d.keys()|d.keys() | list|d.values() | list|d | length|d | list|d | items | list|d | dictsort|d.items() | list | length|l.index(2)|l.count(1)|(1, 1, 2).count(1)|(1, 2).index(2)|d.copy()|l.copy()
l | length|'abc' | length|undefined_name | length|none | length|n | length|l | count|messages | length|d.items() | length
l | first|l | last|empty | first|empty | last|'abc' | first|l | sort|words | sort|words | sort(case_sensitive=true)|l | sort(reverse=true)|people | sort(attribute='age') | map(attribute='name') | list|people | sort(attribute='age,name') | map(attribute='name') | list|l | reverse | list|l | reverse|'abc' | reverse|l | sum|people | sum(attribute='age')|[1.5, 2] | sum|l | max|l | min|words | min|empty | max|l | join|l | join(', ')|[1, none, true] | join('-')|people | join(',', attribute='name')|words | join('')|l | list|'abc' | list|l | unique | list|['a', 'A', 'b'] | unique | list|undefined_name | join(',')
text | upper|text | title|text | capitalize|s | trim|'xax' | trim('x')|'A' | lower|text | replace('o', '0')|text | replace('o', '0', 1)|text | wordcount|text | truncate(5)|text | truncate(7, true)|text | truncate(9, false, '')|text | center(20) ~ '|'|'a\\nb' | indent|'a\\nb' | indent(2)|'a\\n\\nb' | indent(2, true)|'a\\nb' | indent(2, first=true)|'a\\n\\nb' | indent(2, blank=true)|'a\\nb' | indent('> ')|text | wordwrap(5)|text | string|1 | string|1.0 | string|none | string|[1, 'a'] | string|true | string
'<a>' | escape|'<a>' | e|'<a>' | safe|'<a href="x">b</a>' | striptags|'a b&c' | urlencode|{'a': 1, 'b': 'c d'} | urlencode|'12' | int|'x' | int|'x' | int(5)|'3.7' | int|3.7 | int|'1.5' | float|'x' | float|'ff' | int(0, 16)|2.5 | round|3.5 | round|2.567 | round(2)|2.1 | round(0, 'ceil')|2.9 | round(0, 'floor')|-3 | abs|1234567 | filesizeformat|42 | round|'0x1f' | int(0, 16)
undefined_name | default('x')|none | default('x')|'' | default('x')|'' | default('x', true)|none | default('x', boolean=true)|d.zz | default('q')|undefined_name | d('x')|d.zz is defined|d.b is defined|undefined_name is defined|undefined_name is undefined
l | map('string') | list|l | map('int') | join(',')|words | map('upper') | list|people | map(attribute='name') | list|people | map(attribute='zz', default='-') | list|l | select('odd') | list|l | reject('odd') | list|l | select('gt', 1) | list|l | select('>', 1) | list|people | selectattr('age', 'equalto', 3) | map(attribute='name') | list|people | selectattr('age', '==', 3) | list | length|people | rejectattr('age', 'eq', 3) | list | length|people | selectattr('name') | list | length|messages | selectattr('role', 'equalto', 'user') | list | length|messages | selectattr('role', 'in', ['user', 'tool']) | list | length|messages | rejectattr('tool_calls', 'defined') | list | length|people | groupby('age') | list | length|l | batch(2) | list|l | batch(2, 'x') | list|l | slice(2) | list|people | map(attribute='age') | sum|[none, 1, '', 'a'] | select | list
{'a': 1} | tojson|'é' | tojson|'é' | tojson(ensure_ascii=True)|[1, 2] | tojson(separators=(',', ':'))|{'a': 1, 'b': [1]} | tojson(separators=(',', ':'))|1e30 | tojson|1.0 | tojson|1e16 | tojson|none | tojson|true | tojson|'a"\\\\\\n\\t\\u0001/<>&\\'' | tojson|(1, 2) | tojson|[] | tojson|{} | tojson|[] | tojson(indent=2)|{} | tojson(indent=2)|{'b': [1, {'c': []}], 'a': {}} | tojson(indent=2)|{'b': 1, 'a': 2} | tojson(sort_keys=true)|{'b': 1, 'a': 2} | tojson(indent=4, sort_keys=true)|[1, 2] | tojson(indent=0)|[1, [2]] | tojson(indent='--')|{'a': 1} | tojson(indent=2, separators=(', ', ' = '))|'😀' | tojson(ensure_ascii=true)|'😀\\u007f' | tojson|messages[0] | tojson|messages[1] | tojson|tools | tojson|tools[0] | tojson(indent=4)|{1: 'a', none: 'b', false: 'c', 1.5: 'd'} | tojson|undefined_name | tojson|messages[2].content[0].text | tojson|{'a': 1}|tojson|length|0.1 | tojson|-0.0 | tojson|123456789012345678901 | tojson|{'a': 1}.items() | tojson|(1, 2) | tojson(2)
tools is iterable|no_tools is iterable|undefined_name is iterable|'abc' is iterable|d is iterable|1 is iterable|tools is iterable and tools | length > 0|no_tools is iterable and no_tools | length > 0|undefined_name is iterable and undefined_name | length > 0|tools is defined and tools is not none|tools is mapping|d is mapping|l is sequence|'abc' is sequence|d is sequence|none is sequence|undefined_name is sequence|1 is sequence|(1, 2) is sequence|'a' is string|1 is string|none is string|undefined_name is string|none is none|undefined_name is none|1 is number|1.0 is number|true is number|'1' is number|1 is integer|1.0 is integer|true is integer|1.5 is float|1 is float|true is boolean|1 is boolean|true is true|1 is true|false is false|0 is false|1 is odd|2 is even|6 is divisibleby(3)|6 is divisibleby 4|1 is sameas(1)|none is sameas none|true is sameas(true)|'a' is lower|'A' is upper|d.get is callable|d is callable|range is callable|1 is eq(1)|1 is ne 2|1 is lt 2|1 is in([1])|'a' is in 'abc'|1 is not none|'x' is filter|'upper' is filter|'odd' is test|1 is equalto 1|2 is gt(1)|2 is ge 2|2 is le 2|2 is greaterthan(1)|1 is lessthan 2|'a' is escaped
range(3) | list|range(1, 4) | list|range(5, 0, -2) | list|range(3)|range(0) | list|range(3) | length|dict(a=1, b=2)|dict(a=1).a|dict({'a': 1}, b=2)|namespace(a=1).a|cycler('a', 'b').next()|joiner is defined
messages[0].content|messages[0]['role']|messages[0].zz is defined|messages[1].tool_calls[0].function.arguments|messages[1].tool_calls[0].function.arguments | tojson|messages[1].tool_calls[0]['function']['name']|messages[2].content[0].text | length|messages[2].content is string|messages[2].content is iterable|messages[-1].role|(messages | last).role|messages[0].content.split('"')[1]|messages[0].items() | list|messages | map(attribute='role') | join(',')
'a' 'b'|"\\x41\\u00e9"|'\\\\n'|'a\\'b'|"tab\\there"|1_000|0x10|0b11|0o17|1.5e3|not 1 == 2|-n|+n|--1|-l[0]|2 ** 3 ** 2|-2 ** 2|1 + 2 * 3|(1 + 2) * 3|'a' ~ 1 + 2|1 ~ 2 * 3|'a' ~ 'b' | upper|-1 | abs|1 if true else 2 if false else 3|[x for x in l]|l | length > 2 and yes|not l | length|d.a.z is none|loop is defined|caller is defined
{'a': 1}['a']|{'items': 5}.items|{'items': 5}['items']|d.keys|'abc'.zz is defined|(1).zz is defined|none.zz|undefined_name.zz|undefined_name['a']|undefined_name.zz is defined|d.zz.yy|d.zz.yy is defined|none + 1|'a' + 1|1 + 'a'|undefined_name + 'a'|[1] + (2,)|'a' * 'b'|{} + {}|1 < 'a'|none < 1|l.append(4)|d.update({'a': 1})|l.zz()|zz()|d.pop('b')|l | zz|1 is zz|'abc'.format_map({})|1 / 0|1 % 0|int('3')|str(1)|len(l)|''.__class__|l.__class__.__name__|'{0.__class__}'.format(1)|raise_exception('no')|raise_exception()
'abc' | attr('upper')|d | attr('b')|l | tojson | length|l | string | length|people | map(attribute='name') | map('upper') | join(' ')|people | map(attribute='name') | sort | first|[['a', 1], ['b', 2]] | map('first') | list|[[1, 2], [3]] | map('length') | list|[[1, 2], [3]] | sum(start=[])|nested | map('join', '-') | list|{'a': 1}.get('a', {}).zz is defined|'a,b' | replace(',', ';')|'x' | list | length|'x' if not no_tools|['x', 'y'] | last|text | list | length|text.split() | map('length') | list|text.split()[:2] | join('+')|words | map('lower') | sort | list|d | dictsort(by='value') | list | length|{'b': 1, 'a': 2} | dictsort|{'b': 1, 'a': 2} | dictsort(reverse=true)|{'b': 2, 'a': 1} | dictsort(false, 'value')|l | xmlattr|{'a': 1, 'b': none} | xmlattr|'%s' | format('a')|'%s %d' | format('a', 3)|l | pprint|'a' | wordcount|'a b  c' | wordcount|1.0 | int|true | int|none | int|'7' | float|7 | float
""".strip().splitlines()

# Whole templates.
TEMPLATES = [
    "{% for m in messages %}\n  {% if true %}\n[{{ m.role }}]\n  {% endif %}\n{% endfor %}\nend\n",
    "{{ bos_token }}{%- for m in messages -%} {{ m.role }} {%- endfor -%} !",
    "{%- for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.depth }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }};{% endfor %}",
    "{% for a in l %}{{ loop.changed(a > 1) }}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
    "{% for (k, v) in d.items() %}{{ k }}{% endfor %}{% for k, (a, b) in [('x', (1, 2))] %}{{ k }}{{ a }}{{ b }}{% endfor %}",
    "{% for k, v in d | dictsort %}{{ k }}{{ v }}{% endfor %}{% for k, v in d | items %}{{ k }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ x }}{{ loop.index }}{% else %}none{% endfor %}{% for x in empty %}{{ x }}{% else %}none{% endfor %}",
    "{% for x in undefined_name %}{{ x }}{% else %}none{% endfor %}",
    "{% for x in no_tools %}{{ x }}{% endfor %}",
    "{% for x in 'abc' %}{{ x }}{% endfor %}{% for x in 1, 2 %}{{ x }}{% endfor %}{% for x in (1, 2) %}{{ x }}{% endfor %}",
    "{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in nested recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% for i in l %}{% set x = i %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1, found=false) %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.found }}",
    "{% set ns = namespace() %}{% set ns.a = [1] %}{% set ns.a = ns.a + [2] %}{{ ns.a }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = 1, 2 %}{{ c }}{% set (e, f) = (3, 4) %}{{ e }}{{ f }}",
    "{% set x %}a {{ n }} b{% endset %}[{{ x }}]{% set y | upper %}abc{% endset %}{{ y }}",
    "{% macro m(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(1, c=5) }}{{ m() }}",
    "{% macro m(a) %}[{{ caller(a) }}]{% endmacro %}{% call(x) m(5) %}<{{ x }}>{% endcall %}",
    "{% macro m() %}{{ n }}{% endmacro %}{% set n = 9 %}{{ m() }}{{ m.name }}",
    "{%- macro render(p) -%}{{ p.name }}{%- if p.age > 2 -%}!{%- endif -%}{%- endmacro -%}{%- for p in people -%}{{ render(p) }}{%- endfor -%}",
    "{% macro f(x) %}{% if x > 0 %}{{ x }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% filter upper %}abc {{ n }}{% endfilter %}{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}",
    "{% raw %}{{ x }}{% y %}{% endraw %}{# comment {{ x }} #}|{{ '{{' }}{{ '%}' }}",
    "{% if no %}a{% elif yes %}b{% else %}c{% endif %}{% if not no and l %}d{% endif %}{% if undefined_name %}x{% endif %}",
    "{%- generation -%} x {%- endgeneration -%}{% generation %}y{% endgeneration %}",
    "  {%- if yes %}  a\n{%- endif %}\n  b  \n{{- n -}}  \n c",
    "a\n{% if yes %}\nb\n{% endif %}\nc\n    {# comment #}\nd\n   {%+ if yes %}e{% endif +%}\nf",
    "{% if yes -%}\n\n  a\n\n{%- endif %}\n\n\nb{{ '\\n' }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{% set j = joiner(', ') %}{% for x in l %}{{ j() }}{{ x }}{% endfor %}",
    "{% set first = true %}{% for m in messages %}{% if loop.first %}{% set first = false %}{% endif %}{% endfor %}{{ first }}",
    "{% if messages[0]['role'] == 'system' %}s{% else %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}",
    "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ '\\n' }}{% endfor %}",
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls %}{% for t in m.tool_calls %}{{ t.function | tojson }}{% endfor %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls is not none %}{{ m.tool_calls | length }}{% endif %}{% if m.content is string %}s{% elif m.content is iterable %}{% for p in m.content %}{{ p.type }}{% endfor %}{% endif %}{% endfor %}",
    "{%- for tool in tools %}{{ tool.function | tojson(indent=4) }}{% if not loop.last %}\n{% endif %}{%- endfor %}",
    "{%- if tools is not none %}{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}{% endif %}",
    "{% set t = tools | selectattr('type', 'equalto', 'function') | list %}{{ t | length }}{{ t[0].function.parameters.properties.items() | list | length }}",
    "{% for k, v in tools[0].function.parameters.properties.items() %}{{ k }}: {{ v.type }}{{ ', ' if not loop.last }}{% endfor %}",
    "{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }}",
    "{% set x = {'a': 1} %}{% set _ = x.update({'b': 2}) %}{{ x }}",
    "{% set x = [] %}{% do x.append(1) %}{{ x }}",
    "{% set x = [1] %}{% set _ = x.append(2) %}{{ x }}",
    "{{ dict(messages[0], **{'z': 1}) }}",
    "{{ ['%s' % x for x in l] }}",
    "{% for i in range(2) %}{% for j in range(2) %}{{ loop.index0 }}{% endfor %}{% endfor %}{{ range(10)[2:4] | list }}{{ range(10)[-1] }}",
    "{% set content = messages[0].content | trim %}{{ content.split('<b>')[0].strip('\"').rstrip() }}|",
    "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}{{ index }}{% if m.role == 'user' and ns.last == -1 %}{% set ns.last = index %}{% endif %}{% endfor %}{{ ns.last }}",
    "{% if (messages | selectattr('role', 'equalto', 'system') | list | length) == 0 %}none{% endif %}{{ messages | map(attribute='role') | unique | list }}",
    "{{ strftime_now('%Y') | length }}{{ strftime_now is defined }}{{ strftime_now('%d %b') | length }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% block a %}b{{ n }}{% endblock %}",
    "{{ '<b>' }}{{ '<b>' | e }}{{ '<b>' | e ~ '<' }}",
    "{{ 'a\"<'|safe + '<b>' }}{{ '<' + '<'|safe }}{{ '<b>' | e + '<' }}{{ '<%s>' | safe % '<' }}{{ ('<' | safe) ~ '<' }}{{ '<' | safe + 'a' | safe }}",
    "{{ no_tools | selectattr('a') | list }}{{ no_tools | map('upper') | list }}{{ no_tools | select | list | length }}{{ 0 | reject('odd') | list }}",
    "{% autoescape false %}hi{% endautoescape %}{% set a = 9 %}{% with a=1, b=a %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{{ 'abcabc'.find('b', 2) }}{{ 'abcabc'.count('a', 1) }}{{ 'x'.rfind('x', 1) }}{{ 'abcabc'.index('c', -2) }}{{ [1,2,1].index(1, 1) }}{{ 'abc'.startswith('b', 1) }}",
    "{{ {}['items'] is defined }}{{ 'abc'['upper'] is defined }}{{ d['items'] is callable }}{{ d['zz'] is defined }}",
    "{{ 1 // 0.1 }} {{ -7 // 2.5 }} {{ 7 % -2.5 }} {{ -7 % 2.5 }} {{ 1234 | round(-2) }} {{ '%g' % 999999.5 }} {{ '%g' % 0.0001 }}",
    "{% set c = cycler(1, 5, 9) %}{{ 0 < c.next() < 3 }}{{ c.next() }}{{ '' and 1 }}{{ '' or [] or 0 }}{{ [] and 2 }}{{ 0 or 'x' and 'y' }}",
    "{{ '<' | safe is escaped }}{{ '<' is escaped }}{{ ('<' | e) | length }}{{ '&' | e | e }}{{ '&' | e | forceescape }}",
    "{% for m in messages %}{% set role = m.role %}{% if loop.index0 % 2 == 0 %}{{ role }}{% endif %}{% endfor %}{{ role is defined }}",
    "{{ n }}\n",
    "{{ n }}\n\n",
    "\n{{ n }}",
    "{{ messages | length > 2 and messages[1].role == 'assistant' }}{{ (messages | length) % 2 }}{{ messages|length-1 }}",
    "{% set x = 'a' if yes else 'b' %}{{ x }}{% set y = 'a' if no %}[{{ y }}]{{ y is defined }}",
    "{{ 'a\nb' }}{{ \"q'q\" }}{{ 'multi' 'part' }}",
    "{% for x in l | sort %}{{ x }}{{ ',' if not loop.last }}{% endfor %}{% for x in l | reverse %}{{ x }}{% endfor %}{% for a, b in zip(l, l) %}{% endfor %}",
    "{% for x in l %}{{ x }}{% if loop.index == 2 %}{{ loop.index }}{% endif %}{% endfor %}{{ loop }}",
    "{%for x in l%}{{x}}{%endfor%}{%-if yes-%} a {%-endif-%}",
    "{{ {'type': 'a', 'props': {'x': {'t': (1, none)}}} }}{{ {'a': 'b\\'c'} }}{{ {'k': 1.0e20} }}",
]


def render(template):
    try:
        return {"output": _compile_jinja_template(template).render(**VARIABLES)}
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def main():
    expressions = [expression for line in EXPRESSIONS for expression in split(line)]
    cases = []
    here = pathlib.Path(__file__).parent
    variations = [json.loads(line) for line in (here / "variations.jsonl").read_text().splitlines()]
    for template in [f"{{{{ {expression} }}}}" for expression in expressions] + TEMPLATES + variations:
        case = {"template": template, **render(template)}
        # Outputs that contain a memory address are not reproducible.
        if " at 0x" not in case.get("output", ""):
            cases.append(case)
    out = here / "cases.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    out.write_text(f'{{"variables": {json.dumps(VARIABLES, ensure_ascii=False)},\n"cases": [\n{lines}\n]}}\n')
    print(len(cases), "cases,", sum("error" in case for case in cases), "of them errors")


def split(line):
    """Splits at each `|` that has no space before it. Filters are written with spaces around the `|`."""
    parts, start, quote, i = [], 0, None, 0
    while i < len(line):
        c = line[i]
        if quote:
            if c == "\\":
                i += 1
            elif c == quote:
                quote = None
        elif c in "'\"":
            quote = c
        elif c == "|" and line[i - 1] != " ":
            parts.append(line[start:i])
            start = i + 1
        i += 1
    return parts + [line[start:]]


if __name__ == "__main__":
    main()
