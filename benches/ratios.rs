//! `ratios`: the goals of `docs/benchmarks.md`, in half a minute and on a machine that is not idle.
//!
//! Question: do the promised ratios hold here? The cases of a group take turns in short bursts, and
//! the fastest burst of each counts (`qkd_bridge::bench`). Criterion's benches measure the same code
//! one case after another, with statistics, and want an idle machine. `-- --test` runs every case
//! once; `-- WORD` measures the groups with that word in their name.

use std::time::Duration;

use qkd_bridge::bench::groups;
use qkd_kernels::Backend;

/// For each group.
const BUDGET: Duration = Duration::from_millis(1500);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let once = args.iter().any(|arg| arg == "--test");
    let wanted = args.iter().find(|arg| !arg.starts_with('-'));
    println!("backend {}", Backend::detect().name());
    for make in groups::all() {
        let mut group = make();
        let name = format!("{}/{}", group.name, group.size_bytes);
        if wanted.is_some_and(|word| !name.contains(word.as_str())) {
            continue;
        }
        if once {
            for case in &mut group.cases {
                case.once();
            }
            println!("{name}: runs");
            continue;
        }
        let speeds = group.measure(BUDGET);
        let list: Vec<String> = speeds
            .iter()
            .map(|speed| format!("{} {:.2}", speed.name, speed.gb_per_s))
            .collect();
        println!("{name}: {} GB/s", list.join(", "));
        for (goal, ratio) in group.judge(&speeds) {
            let verdict = if ratio >= goal.least {
                "holds"
            } else {
                "missed"
            };
            let groups::Goal { fast, slow, least } = goal;
            println!("  {fast} / {slow} = {ratio:.2}, goal {least}: {verdict}");
        }
    }
}
