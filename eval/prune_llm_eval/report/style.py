"""How the page looks. The only place that names a colour: light, and dark where that is preferred.

Series have Okabe and Ito's colours, which colour-blind readers tell apart, as in the pictures of
`compare`; on dark ground they are lighter.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;
--ground:#ffffff;--panel:#f5f7f9;--ink:#16202a;--soft:#56616d;--rule:#dde3e9;--grid:#e6ebf0;
--good:#00734f;--bad:#b3420a;--accent:#0072b2;
--dense:#3d4650;--model:#0072b2;--transformers:#8b95a0;
--a:#d55e00;--b:#009e73;--c:#b8558f;--d:#a87000;--e:#3a8fc2;--f:#7a1f5c;
--heat:#004c7d;--heat0:#eaf2f8;--empty:#eef0f2;--on-heat:#ffffff;
--flip:#b3420a;--flip-ground:#ffe3d1;--kl:213,94,0}
@media (prefers-color-scheme:dark){:root{
--ground:#10151b;--panel:#182029;--ink:#e7ecf1;--soft:#9eabb8;--rule:#2b3641;--grid:#232d37;
--good:#3fd3a3;--bad:#ff9a61;--accent:#6cbdf0;
--dense:#c6d0da;--model:#56b4e9;--transformers:#7d8996;
--a:#ff8b3d;--b:#2fd0a0;--c:#ea9ccb;--d:#f0b83c;--e:#9fd3f5;--f:#d67ab5;
--heat:#7cc8f5;--heat0:#1b2a36;--empty:#1c242d;--on-heat:#06121c;
--flip:#ffb183;--flip-ground:#4a2a17;--kl:255,139,61}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.3;margin:44px 0 12px;padding-top:20px;
border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:24px 0 6px}
p{margin:8px 0}
.sub,.note,figcaption span{color:var(--soft)}
.sub{overflow-wrap:anywhere}
.note,figcaption span{font-size:.86rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:16px 0 0;font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:12px;
margin:22px 0 10px;padding:0;list-style:none}
.cards li{background:var(--panel);border:1px solid var(--rule);border-radius:10px;
padding:12px 14px}
.cards .label,.cards .detail{display:block}
.cards .label{font-size:.82rem;color:var(--soft)}
.cards strong{display:block;font-size:1.55rem;line-height:1.3;font-weight:650;
font-variant-numeric:tabular-nums}
.cards .detail{font-size:.8rem;color:var(--soft);line-height:1.4}
.good strong,.good.target{color:var(--good)}
.bad strong,.bad.target{color:var(--bad)}
.target{font-weight:600;font-size:1.05rem;margin:18px 0 0}
.verdict{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:6px 28px}
.verdict h3{margin:16px 0 4px}
.verdict ul,.warnings,.missing{margin:0;padding-left:1.15em}
.verdict li,.warnings li,.missing li{margin:5px 0;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:20px;
align-items:start;margin-top:14px}
figure{margin:0;background:var(--panel);border:1px solid var(--rule);border-radius:10px;
padding:14px 14px 10px;min-width:0}
figcaption strong{display:block;line-height:1.35}
figcaption span{display:block;line-height:1.45;margin-top:2px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:10px 0 2px;padding:0;list-style:none;
font-size:.86rem}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.legend svg{width:18px;height:14px;flex:none}
.picture{display:block;width:100%;height:auto;margin-top:6px;overflow:visible}
.picture text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--ink)}
.picture .tick{fill:var(--soft)}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.baseline{stroke:var(--dense);stroke-dasharray:5 4;stroke-width:1.3}
.line{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round}
.whisker{fill:none;stroke:currentColor;stroke-width:1.3;opacity:.75}
.series .mark,.legend .mark{fill:currentColor;stroke:var(--panel);stroke-width:1}
.series .open,.legend .open{fill:none;stroke:currentColor;stroke-width:2.4}
.s-dense{color:var(--dense)}.s-model{color:var(--model)}.s-transformers{color:var(--transformers)}
.s-a{color:var(--a)}.s-b{color:var(--b)}.s-c{color:var(--c)}
.s-d{color:var(--d)}.s-e{color:var(--e)}.s-f{color:var(--f)}
.cell{fill:color-mix(in srgb,var(--heat) var(--share),var(--heat0))}
.cell.empty{fill:var(--empty)}
.picture .number{font-size:12px;pointer-events:none;font-variant-numeric:tabular-nums}
.picture .strong{fill:var(--on-heat)}
.scroll{overflow-x:auto;margin:10px 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 12px 5px 0;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
td:first-child{font-weight:500}
.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.words td:first-child{white-space:nowrap;color:var(--soft);width:9em}
.words th{display:none}
details{margin:8px 0 2px}
summary{cursor:pointer;color:var(--soft);font-size:.86rem;padding:4px 0}
.passage{background:var(--panel);border:1px solid var(--rule);border-radius:10px;
padding:12px 16px;margin:12px 0}
.passage p{margin:6px 0;line-height:1.95;overflow-wrap:anywhere}
.passage .before{color:var(--soft)}
.token{border-radius:3px;padding:1px 0;background:rgba(var(--kl),calc(var(--much)*.55))}
.flip{color:var(--flip);font-weight:650;text-decoration:underline;text-decoration-thickness:2px;
text-underline-offset:4px;border-radius:3px}
.flips{font-size:.86rem;margin:6px 0 0;padding-left:1.15em;color:var(--soft);overflow-wrap:anywhere}
.flips b{color:var(--ink);font-weight:600}
.key{font-size:.86rem;color:var(--soft)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media (min-width:900px){.picture text{font-size:11px}.picture .number{font-size:10px}}
@media (max-width:520px){main{padding:20px 14px 48px}h1{font-size:1.5rem}
.cards{grid-template-columns:repeat(2,1fr);gap:8px}.cards strong{font-size:1.3rem}
.cards li{padding:10px 11px}figure{padding:12px 8px 8px}figcaption,.legend{padding:0 4px}
.words td:first-child{white-space:normal;width:6em}}
@media print{details{display:none}figure,.passage,.cards li{break-inside:avoid}}
"""
