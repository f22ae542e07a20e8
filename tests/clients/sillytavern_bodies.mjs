// What SillyTavern's page sends for a text completion: its own function for that, taken out of the page and run here.
//
//   node tests/clients/sillytavern_bodies.mjs PACKAGE > tests/server/data/sillytavern_VERSION_page.json
//
// PACKAGE is the unpacked npm package. Each connection type is asked with the settings it starts with and with all of
// its samplers on; then its server's own lists of keys say what of that leaves for types that send a part only.

import fs from 'node:fs';
import path from 'node:path';

const root = process.argv[2];
const page = fs.readFileSync(path.join(root, 'public/scripts/textgen-settings.js'), 'utf8');
const constants = fs.readFileSync(path.join(root, 'src/constants.js'), 'utf8');

/** The text from `start` to the first `end` behind it. */
function cut(text, start, end) {
    const from = text.indexOf(start);
    if (from < 0) throw new Error(`SillyTavern has no ${start} any more`);
    return text.slice(from, text.indexOf(end, from) + end.length).replace(/^export /, '');
}

const lists = ['const LLAMACPP_DEFAULT_ORDER', 'const OOBA_DEFAULT_ORDER', 'export const APHRODITE_DEFAULT_ORDER', 'const KOBOLDCPP_ORDER'];
const functions = ['function getCustomTokenBans', 'function isDynamicTemperatureSupported', 'function toIntArray', 'function replaceMacrosInList', 'export function getLogprobsNumber', 'export function createTextGenGenerationData'];
const source = [
    cut(page, 'export const textgen_types = {', '\n};'),
    cut(page, 'const {\n    GENERIC', '} = textgen_types;'),
    ...lists.map(name => cut(page, name, '];')),
    cut(page, 'export const textgenerationwebui_settings = {', '\n};'),
    ...functions.map(name => cut(page, name, '\n}')),
    'return { textgenerationwebui_settings, createTextGenGenerationData };',
].join('\n');

// What the function takes from the rest of the page.
const surroundings = {
    power_user: { request_token_probabilities: true },
    console: { log() {}, debug() {} },
    substituteParams: text => text,
    isObject: value => value !== null && typeof value === 'object' && !Array.isArray(value),
    arraysEqual: (one, other) => JSON.stringify(one) === JSON.stringify(other),
    onlyUnique: (value, index, array) => array.indexOf(value) === index,
    getStoppingStrings: () => ['\nUser:', '\nBob:'],
    getTextGenServer: () => 'http://127.0.0.1:2242',
    getTextGenModel: () => '',
    getTokenizerForTokenIds: () => 0,
    getTextTokens: () => [],
    calculateLogitBias: () => ({ 5: -1.5, 9: 3 }),
    BIAS_CACHE: new Map(),
    BIAS_KEY: '',
    DYNATEMP_BLOCK: { dataset: { tgType: 'ooba, mancer, koboldcpp, tabby, llamacpp, aphrodite' } },
    max_context: 4096,
};
const mutable = 'let textgenerationwebui_banned_in_macros = [];\n';
const { textgenerationwebui_settings, createTextGenGenerationData } =
    new Function(...Object.keys(surroundings), mutable + source)(...Object.values(surroundings));

const everything = {
    n: 2, temp: 0.9, dynatemp: true, min_temp: 0.5, max_temp: 1.3, top_p: 0.9, top_k: 40, min_p: 0.05, rep_pen: 1.1,
    rep_pen_range: 512, rep_pen_slope: 0.7, dry_multiplier: 0.8, xtc_probability: 0.5, nsigma: 1, smoothing_factor: 0.2,
    mirostat_mode: 2, banned_tokens: '"tapestry"\n[5,6]', logit_bias: [{ text: 'x', value: 1 }], seed: 7, top_a: 0.1,
    tfs: 0.97, typical_p: 0.98, skew: 0.1, adaptive_target: 0.5, guidance_scale: 1.2, negative_prompt: 'bad',
};
const paths = { llamacpp: '/completion', ollama: '/api/generate' };

function sent(type, settings) {
    const asked = createTextGenGenerationData(
        { ...textgenerationwebui_settings, ...settings, type }, 'SmolLM2-135M-Instruct', 'The sea was', 12, false, false, null, 'normal');
    const body = JSON.parse(JSON.stringify({ ...asked, api_type: type }));
    const part = name => {
        const keys = [...cut(constants, `export const ${name} = [`, ']').matchAll(/'(\w+)'/g)].map(match => match[1]);
        return Object.fromEntries(Object.entries(body).filter(([key]) => keys.includes(key)));
    };
    if (type === 'generic') return part('OPENAI_KEYS');
    if (type === 'vllm') return part('VLLM_KEYS');
    if (type === 'ollama') {
        return { model: body.model, prompt: body.prompt, stream: false, keep_alive: -1, raw: true, options: part('OLLAMA_KEYS') };
    }
    return body;
}

const rows = [];
for (const type of ['ooba', 'vllm', 'aphrodite', 'tabby', 'koboldcpp', 'llamacpp', 'ollama', 'generic']) {
    for (const [name, settings] of Object.entries({ defaults: {}, everything })) {
        rows.push(JSON.stringify({ type, settings: name, path: paths[type] ?? '/v1/completions', body: sent(type, settings) }));
    }
}
console.log(`[\n${rows.join(',\n')}\n]`);
