//! A network namespace for each node, joined by a hub that loses packets: iproute2 and nftables.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Runs a test of this program again, alone, in a network namespace of its own, or says why it
/// cannot be had. `inside` tells the test that it is there.
pub(crate) fn run_inside(test: &str, inside: &str) {
    let root = nix::unistd::geteuid().is_root();
    let user: &[&str] = if root {
        &[]
    } else {
        &["--user", "--map-root-user"]
    };
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(user).args(["--net", "--mount"]);
        command
    };
    // All that the test needs, tried: namespaces by name, a pair of interfaces, a rule.
    let needed = "mount -t tmpfs tmpfs /run && ip link set lo up && ip netns add n \
         && echo 1 > /proc/sys/net/ipv4/ip_forward \
         && ip link add veth0 type veth peer name veth1 netns n \
         && nft add table inet t && nft add chain inet t c '{ type filter hook forward priority 0; }' \
         && nft add rule inet t c numgen random mod 100 '<' 1 counter drop";
    let tried = unshare().args(["sh", "-c", needed]).output();
    match tried {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            return println!("SKIPPED: no network namespaces, veth and nft here: {why}");
        }
        Err(error) => return println!("SKIPPED: no unshare here: {error}"),
    }
    let hub = "mount -t tmpfs tmpfs /run && ip link set lo up \
         && echo 1 > /proc/sys/net/ipv4/ip_forward && exec \"$0\" \"$@\"";
    let status = unshare()
        .args(["sh", "-c", hub])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(inside, "1")
        .status()
        .unwrap();
    assert!(status.success(), "the test failed inside its namespace");
}

/// The namespaces of the nodes; this process is the hub. They end with the hub's mounts.
pub(crate) struct Namespaces {
    names: Vec<String>,
    /// Runs the program under test in the namespace of the node whose configuration it is given.
    pub(crate) program: PathBuf,
}

impl Namespaces {
    /// Makes them; `program` is the program under test.
    pub(crate) fn new(dir: &Path, program: &Path, names: &[&str]) -> Self {
        let this = Self {
            names: names.iter().map(|&name| name.to_owned()).collect(),
            program: dir.join("in-namespace"),
        };
        for name in names {
            let (hub, own) = (this.hub_address(name), this.address(name));
            run(&format!("ip netns add {name}"));
            run(&format!(
                "ip link add {name} type veth peer name eth0 netns {name}"
            ));
            run(&format!("ip address add {hub}/24 dev {name}"));
            run(&format!("ip link set {name} up"));
            let inside = |command: &str| run(&format!("ip netns exec {name} {command}"));
            inside("ip link set lo up");
            inside(&format!("ip address add {own}/24 dev eth0"));
            inside("ip link set eth0 up");
            inside(&format!("ip route add default via {hub}"));
        }
        run("nft add table inet hub");
        run("nft add chain inet hub forward '{ type filter hook forward priority 0; }'");
        run("nft add counter inet hub lost");
        let script = format!(
            "#!/bin/sh\n\
             name=$(basename \"$3\" .toml)\n\
             if [ \"$1\" = run ]; then exec ip netns exec \"$name\" '{program}' \"$@\"; fi\n\
             exec '{program}' \"$@\"\n",
            program = program.display()
        );
        fs::write(&this.program, script).unwrap();
        fs::set_permissions(&this.program, fs::Permissions::from_mode(0o700)).unwrap();
        this
    }

    fn number(&self, name: &str) -> usize {
        self.names.iter().position(|other| other == name).unwrap()
    }

    /// Where a node is.
    pub(crate) fn address(&self, name: &str) -> String {
        format!("10.77.{}.2", self.number(name))
    }

    /// Where a node finds the hub.
    pub(crate) fn hub_address(&self, name: &str) -> String {
        format!("10.77.{}.1", self.number(name))
    }

    /// Loses one in so many of the packets between nodes, at random.
    pub(crate) fn lose_one_in(&self, number: u32) {
        self.lose_none();
        run(&format!(
            "nft add rule inet hub forward numgen random mod {number} '<' 1 counter name lost drop"
        ));
    }

    /// Loses none.
    pub(crate) fn lose_none(&self) {
        run("nft flush chain inet hub forward");
    }

    /// Packets lost so far.
    pub(crate) fn packets_lost(&self) -> u64 {
        let text = run("nft list counter inet hub lost");
        let mut words = text
            .split_whitespace()
            .skip_while(|word| *word != "packets");
        words.nth(1).unwrap().parse().unwrap()
    }
}

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {why}");
    String::from_utf8(output.stdout).unwrap()
}
