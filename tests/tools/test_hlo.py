"""What is read off an optimised program, on one made up for the purpose."""

from tools.gpu_check.hlo import Sites, moved_bytes, sites

KERNEL = "the_kernel"
SITE = 'metadata={op_name="jit(f)/jvp(Net)/norm/jit(_fake_quant)/OP"}'
FUSED = f"""
ENTRY %main (x: f32[2,4,4,8], n: f32[2,8]) -> f32[2,4,4,8] {{
  %x = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  %n = f32[2,8]{{1,0}} parameter(1)
  %b = f32[2,16,8]{{2,1,0}} bitcast(%x)
  ROOT %k = f32[2,16,8]{{2,1,0}} custom-call(%b, %n), custom_call_target="triton", {SITE.replace("OP", KERNEL)}
}}
"""
CHAIN = f"""
%norm (p: f32[2,4,4,8], n: f32[2,8]) -> f32[2,4,4,8] {{
  %p = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  ROOT %m = f32[2,4,4,8]{{3,2,1,0}} multiply(%p, %p), metadata={{op_name="jit(f)/jvp(Net)/norm/bn/mul"}}
}}

%ranges (q: f32[2,4,4,8]) -> f32[2,8] {{
  %q = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  ROOT %r = f32[2,8]{{1,0}} reduce(%q, %q), dimensions={{1,2}}, {SITE.replace("OP", "reduce_min")}
}}

%levels (s: f32[2,4,4,8], t: f32[2,8]) -> f32[2,4,4,8] {{
  %s = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  %t = f32[2,8]{{1,0}} parameter(1)
  ROOT %c = f32[2,4,4,8]{{3,2,1,0}} round-nearest-even(%s), {SITE.replace("OP", "round")}
}}

%backward (u: f32[2,4,4,8]) -> f32[2,4,4,8] {{
  %u = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  ROOT %w = f32[2,4,4,8]{{3,2,1,0}} negate(%u), {SITE.replace("OP", "neg").replace("jvp(Net)", "transpose(jvp(Net))")}
}}

ENTRY %main (x: f32[2,4,4,8], n: f32[2,8]) -> f32[2,4,4,8] {{
  %x = f32[2,4,4,8]{{3,2,1,0}} parameter(0)
  %n = f32[2,8]{{1,0}} parameter(1)
  %v = f32[2,4,4,8]{{3,2,1,0}} fusion(%x, %n), kind=kLoop, calls=%norm
  %a = f32[2,8]{{1,0}} fusion(%v), kind=kInput, calls=%ranges
  %y = f32[2,4,4,8]{{3,2,1,0}} fusion(%v, %a), kind=kLoop, calls=%levels
  ROOT %z = f32[2,4,4,8]{{3,2,1,0}} fusion(%y), kind=kLoop, calls=%backward
}}
"""
MAP, NUMBERS = 4 * 2 * 4 * 4 * 8, 4 * 2 * 8


def test_a_fused_site_is_one_read_and_one_write():
    assert sites(FUSED, KERNEL) == Sites(kernels=1, others=0, unfused=0, moved_bytes=2 * MAP + NUMBERS)


def test_an_unfused_site_is_its_passes_and_the_norm_before():
    moved = 5 * MAP + 3 * NUMBERS  # x to v, v to ranges, v to y; and the numbers in, out and in
    assert sites(CHAIN, KERNEL) == Sites(kernels=0, others=3, unfused=2, moved_bytes=moved)
    assert moved_bytes(CHAIN) == moved + 2 * MAP
