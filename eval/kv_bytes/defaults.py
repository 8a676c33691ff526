"""What a field means that a config.json leaves out, by model type.

Names and values are those of the model types' own configuration classes, which leave out what equals a default. A dot
is a field that has no default: where it counts, the config has to give it.
"""

# windows: "all": every layer has the window; a number n: every n-th layer is without; "late": layers from
# max_window_layers on, if use_sliding_window; "list": those that layer_types names; ".": none, or no default.
GROUPED = """
type              layers width heads kv  head_dim window windows context
afmoe             32     2048  16    .   128      1024   4       16384
apertus           32     4096  32    .   .        .      .       65536
aquila            .      .     .     .   .        .      .       .
arcee             32     2560  32    .   .        .      .       4096
arctic            .      .     .     .   .        .      .       .
aria              32     4096  32    .   .        .      .       2048
baichuan          .      .     .     .   .        .      .       .
bailing_moe       .      .     .     .   .        .      .       .
bailing_moe_v2    .      .     .     .   .        .      .       .
bamba             32     4096  32    8   .        .      .       262144
biogpt            24     1024  16    .   .        .      .       1024
bitnet            30     2560  20    5   .        .      .       2048
bloom             2      64    8     .   .        .      .       2048
codegen           28     4096  16    .   .        .      .       2048
cohere            40     8192  64    .   .        .      .       8192
cohere2           40     8192  64    .   .        4096   4       8192
cohere2_moe       40     8192  64    .   128      4096   list    8192
cohere_asr        8      1024  8     .   .        .      .       1024
cwm               64     6144  48    8   128      8192   list    131072
dbrx              24     2048  16    .   .        .      .       2048
deepseek          .      .     .     .   .        .      .       .
deepseek_v4       43     4096  64    1   512      128    .       1048576
diffllama         16     2048  32    .   .        .      .       2048
dots1             62     4608  32    32  .        4096   late    2048
ernie4_5          18     1024  16    2   128      .      .       131072
ernie4_5_moe      28     2560  20    4   .        .      .       131072
ernie4_5_vl_moe   28     2560  20    4   .        .      .       131072
exaone            32     4096  32    8   .        .      .       4096
exaone4           32     4096  32    32  .        4096   4       2048
exaone_moe        32     4096  32    32  .        4096   4       2048
falcon            32     4544  71    .   .        .      .       2048
falcon_h1         32     4096  32    8   .        .      .       8192
falcon_mamba      32     768   .     .   .        .      .       .
flex_olmo         32     4096  32    .   .        .      .       4096
gemma             28     3072  16    16  256      .      .       8192
gemma2            26     2304  8     4   256      4096   2       8192
gemma3            26     2304  8     4   256      4096   6       131072
gemma3n           35     2048  8     2   256      512    .       32768
gemma4            30     2304  8     4   256      512    .       131072
gemma4_unified    30     2304  8     4   256      1024   .       262144
glm               40     4096  32    2   128      .      .       131072
glm4              40     4096  32    2   128      .      .       131072
glm4_moe          46     4096  96    8   .        .      .       131072
glm4v             40     4096  32    2   .        .      .       32768
glm4v_moe         46     4096  96    8   .        .      .       65536
glm_ocr           16     1024  16    8   .        .      .       131072
gpt2              12     768   12    .   .        .      .       1024
gpt_bigcode       12     768   12    .   .        .      .       1024
gpt_neo           24     2048  16    .   .        .      .       2048
gpt_neox          44     6144  64    .   .        .      .       2048
gpt_neox_japanese 32     2560  32    .   .        .      .       2048
gpt_oss           36     2880  64    8   64       128    2       131072
gptj              28     4096  16    .   .        .      .       2048
granite           32     4096  32    .   .        .      .       2048
granite_swa       24     2560  20    4   .        128    list    8192
granitemoe        32     4096  32    .   .        .      .       2048
granitemoehybrid  32     4096  32    .   .        .      .       2048
granitemoeshared  32     4096  32    .   .        .      .       2048
helium            24     2560  20    20  128      .      .       4096
hunyuan_v1_dense  32     4096  32    .   .        .      .       2048
hunyuan_v1_moe    32     4096  32    .   .        .      .       2048
hunyuan_vl        32     4096  32    .   .        .      .       2048
hy_v3             80     4096  64    8   128      .      .       131072
hyperclovax       32     4096  32    .   .        .      .       2048
internlm          .      .     .     .   .        .      .       .
internlm2         .      .     .     .   .        .      .       .
internlm3         48     4096  32    2   128      .      .       32768
iquestcoder       80     5120  40    8   128      .      .       131072
jais              .      .     .     .   .        .      .       .
jais2             32     3328  26    .   .        .      .       8192
jamba             32     4096  32    8   .        .      .       262144
jetmoe            12     2048  .     16  128      .      .       4096
laguna            40     2048  48    8   128      512    list    131072
lfm2              32     2560  32    8   .        .      .       128000
lfm2_moe          32     2048  32    8   .        .      .       128000
llama             32     4096  32    .   .        .      .       2048
llama4            48     5120  40    8   128      .      .       131072
mamba             32     768   .     .   .        .      .       .
mamba2            64     .     .     .   .        .      .       .
mellum            28     2304  32    4   128      1024   list    131072
mimo              .      .     .     .   .        .      late    .
mimo_v2           48     4096  64    4   192      128    .       131072
mimo_v2_flash     48     4096  64    4   192      128    .       131072
minicpm           .      .     .     .   .        .      .       .
minimax           32     4096  32    8   .        .      .       131072
minimax_m2        62     3072  48    8   128      .      .       196608
minimax_m3        60     6144  64    4   128      .      .       524288
minimax_m3_vl     60     6144  64    4   128      .      .       524288
ministral         32     4096  32    8   .        4096   all     131072
ministral3        34     4096  32    8   128      .      all     262144
mistral           32     4096  32    8   .        4096   all     131072
mixtral           32     4096  32    8   .        .      all     131072
mllama            40     4096  32    8   .        .      .       131072
mpt               24     2048  16    .   .        .      .       2048
mt5               8      512   6     .   .        .      .       .
nanochat          12     768   6     .   .        .      .       2048
nemotron          32     6144  48    .   .        .      .       4096
nemotron_h        .      4096  32    8   128      .      .       4096
olmo              32     4096  32    .   .        .      .       2048
olmo2             32     4096  32    .   .        .      .       2048
olmo3             32     4096  32    .   .        4096   4       2048
olmo_hybrid       32     3840  30    .   .        .      .       65536
olmoe             16     2048  16    .   .        .      .       4096
opt               12     768   12    .   .        .      .       2048
orion             .      .     .     .   .        .      .       .
paddleocr_vl      18     1024  16    2   128      .      .       131072
persimmon         36     4096  64    .   .        .      .       16384
phi               24     2048  32    .   .        .      .       2048
phi-msft          .      .     .     .   .        .      .       .
phi3              32     3072  32    .   .        .      all     4096
phi3_v            32     3072  32    .   .        .      all     4096
phi4_multimodal   32     3072  32    8   .        .      all     131072
phi4mm            32     3072  32    8   .        .      all     131072
phimoe            32     4096  32    8   .        .      all     131072
plamo2            32     4096  32    4   128      2048   .       2048
qwen              .      .     .     .   .        .      .       .
qwen2             32     4096  32    32  .        4096   late    32768
qwen2_5_omni      28     3584  28    4   .        32768  late    32768
qwen2_5_vl        80     8192  64    8   .        4096   late    32768
qwen2_moe         24     2048  16    16  .        4096   list    32768
qwen2_vl          80     8192  64    8   .        4096   late    32768
qwen3             32     4096  32    32  128      4096   late    32768
qwen3_5           32     4096  16    4   256      .      .       32768
qwen3_5_moe       40     2048  16    2   256      .      .       32768
qwen3_moe         24     2048  32    4   .        4096   all     32768
qwen3_next        48     2048  16    2   256      .      .       32768
qwen3_omni_moe    28     2048  28    4   .        .      all     32768
qwen3_vl          32     4096  32    32  128      .      .       128000
qwen3_vl_moe      24     2048  16    16  .        .      .       128000
recurrent_gemma   26     2560  10    .   .        2048   .       .
sarvam_moe        19     4096  64    4   64       .      .       131072
seed_oss          64     4096  80    8   128      .      .       524288
smollm3           36     2048  16    4   .        .      list    32768
solar_open        48     4096  64    8   128      .      .       131072
stablelm          32     2560  32    32  .        .      .       4096
stablelm_epoch    .      .     .     .   .        .      .       .
starcoder2        30     3072  24    2   .        .      all     4096
step3             61     7168  64    1   256      .      .       65536
step3p5           45     4096  64    8   128      .      .       128000
switch_transformers 12     768   12    .   .        .      .       .
t5                6      512   8     .   .        .      .       .
umt5              8      512   6     .   .        .      .       .
vaultgemma        26     2304  8     4   256      4096   2       8192
xglm              24     1024  16    .   .        .      .       2048
xverse            .      .     .     .   .        .      .       .
zamba             76     3712  16    16  .        .      .       4096
zamba2            54     2560  32    .   .        .      .       4096
"""
GROUPED_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "windows": "windows",
    "context": "max_position_embeddings",
}
# A latent of `rank` and a rotary key for each token (MLA); topk, index: an index that selects tokens (DSA).
LATENT = """
type           layers rank rope context topk index
axk1           61     512  64   32768   .    .
axk2           48     128  32   131072  2048 128
bailing_hybrid 42     512  64   262144  .    .
deepseek_v2    32     512  64   2048    .    .
deepseek_v3    61     512  64   4096    .    .
deepseek_v32   61     512  64   163840  2048 128
glm4_moe_lite  47     512  64   202752  .    .
glm5_next      45     512  .    1048576 2048 128
glm_moe_dsa    78     512  64   202752  2048 128
kimi_k2        61     512  64   4096    .    .
kimi_linear    27     512  64   1048576 .    .
longcat_flash  28     512  64   131072  .    .
minicpm3       62     256  32   32768   .    .
mistral4       36     256  64   1048576 .    .
sarvam_mla     32     512  64   4096    .    .
youtu          32     512  64   131072  .    .
"""
LATENT_FIELDS = {
    "layers": "num_hidden_layers",
    "rank": "kv_lora_rank",
    "rope": "qk_rope_head_dim",
    "context": "max_position_embeddings",
    "topk": "index_topk",
    "index": "index_head_dim",
}


def _rows(table: str, fields: dict[str, str]) -> dict[str, dict]:
    head, *rows = (line.split() for line in table.strip().splitlines())
    return {
        name: {
            fields[column]: int(cell) if cell.isdecimal() else cell
            for column, cell in zip(head[1:], cells, strict=True)
            if cell != "."
        }
        for name, *cells in rows
    }


DEFAULTS = _rows(GROUPED, GROUPED_FIELDS) | _rows(LATENT, LATENT_FIELDS)
LATENT_TYPES = _rows(LATENT, LATENT_FIELDS).keys()
