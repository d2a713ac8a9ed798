//! Owner, group and mode: who may do what, and the command that changes it.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgroups};

use super::{Advice, above, quoted};

/// What is to be done with a file or folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// Read and write a file.
    ReadWrite,
    /// Read a folder, enter it, and take files out of it.
    Take,
    /// Go through a folder.
    Enter,
}

impl Want {
    const fn bits(self) -> u32 {
        match self {
            Self::ReadWrite => 0o6,
            Self::Take => 0o7,
            Self::Enter => 0o1,
        }
    }

    const fn letters(self) -> &'static str {
        match self {
            Self::ReadWrite => "rw",
            Self::Take => "rwx",
            Self::Enter => "x",
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::ReadWrite => "read and write it",
            Self::Take => "take files out of it",
            Self::Enter => "go through it",
        }
    }
}

/// Who asks.
#[derive(Debug)]
pub(super) struct Me {
    pub(super) name: String,
    uid: u32,
    /// The group that its files get.
    group_name: String,
    /// The groups of this process.
    groups: Vec<u32>,
}

impl Me {
    pub(super) fn get() -> Self {
        let uid = geteuid();
        let mut groups: Vec<u32> = getgroups()
            .unwrap_or_default()
            .into_iter()
            .map(Gid::as_raw)
            .collect();
        groups.push(getegid().as_raw());
        Self {
            name: name_of_user(uid),
            uid: uid.as_raw(),
            group_name: name_of_group(getegid()),
            groups,
        }
    }
}

/// What is known of a file.
#[derive(Debug, Clone)]
struct Facts {
    owner_uid: u32,
    group_gid: u32,
    group_name: String,
    mode: u32,
    is_device: bool,
    /// Whether the group's list of members has this user, even if this process came before that.
    group_lists_me: bool,
}

/// The first thing on the way to `path`, or at its end, that this user lacks the right for.
pub(super) fn missing(path: &Path, want: Want, me: &Me) -> Option<Advice> {
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    above(&real)
        .iter()
        .find_map(|folder| missing_at(folder, Want::Enter, me))
        .or_else(|| missing_at(&real, want, me))
}

fn missing_at(path: &Path, want: Want, me: &Me) -> Option<Advice> {
    let metadata = fs::metadata(path).ok()?;
    let group = Group::from_gid(Gid::from_raw(metadata.gid()))
        .ok()
        .flatten();
    let facts = Facts {
        owner_uid: metadata.uid(),
        group_gid: metadata.gid(),
        group_lists_me: group.as_ref().is_some_and(|g| g.mem.contains(&me.name)),
        group_name: group.map_or_else(|| metadata.gid().to_string(), |group| group.name),
        mode: metadata.mode() & 0o7777,
        is_device: metadata.file_type().is_char_device(),
    };
    advise(path, &facts, want, me)
}

/// The rule of the kernel: the owner's bits if the owner asks, else the group's if a member does, else
/// the others'. Root may do all of it.
fn may(facts: &Facts, want: Want, me: &Me) -> bool {
    let shift = if facts.owner_uid == me.uid {
        6
    } else if me.groups.contains(&facts.group_gid) {
        3
    } else {
        0
    };
    me.uid == 0 || (facts.mode >> shift) & want.bits() == want.bits()
}

fn advise(path: &Path, facts: &Facts, want: Want, me: &Me) -> Option<Advice> {
    if may(facts, want, me) {
        return None;
    }
    let (group, user, place) = (&facts.group_name, &me.name, quoted(path));
    let is_open_to_group = (facts.mode >> 3) & want.bits() == want.bits();
    let is_member = me.groups.contains(&facts.group_gid);
    // Group root is for root alone.
    if is_open_to_group && !is_member && facts.group_gid != 0 {
        return Some(if facts.group_lists_me {
            Advice::new(
                format!(
                    "user {user} came to group {group} after this program began: log in again, or restart the service"
                ),
                format!("newgrp {group}"),
            )
        } else {
            Advice::new(
                format!(
                    "user {user} is not in group {group}, which {place} belongs to (then log in again, or restart the service)"
                ),
                format!("sudo usermod -aG {group} {user}"),
            )
        });
    }
    let (words, letters) = (want.words(), want.letters());
    let problem = format!(
        "user {user} may not {words}: {place} belongs to user {} and group {group}, with mode {:o}",
        name_of_user(Uid::from_raw(facts.owner_uid)),
        facts.mode
    );
    if facts.owner_uid == me.uid {
        return Some(Advice::new(problem, format!("chmod u+{letters} {place}")));
    }
    if facts.is_device {
        // A device's mode is made anew at every plug-in: udev has to do it.
        let problem =
            format!("{problem}; the udev rules of this package set group and mode for good");
        let command = format!("sudo chown {user} {place}");
        return Some(Advice::new(problem, command));
    }
    let command = match want {
        Want::Enter => format!("sudo chmod o+x {place}"),
        // The owner may be the vendor's program: leave it what it has.
        _ if is_member => format!("sudo chmod g+{letters} {place}"),
        _ => {
            let mine = &me.group_name;
            format!("sudo chgrp {mine} {place} && sudo chmod g+{letters} {place}")
        }
    };
    Some(Advice::new(problem, command))
}

fn name_of_user(uid: Uid) -> String {
    User::from_uid(uid)
        .ok()
        .flatten()
        .map_or_else(|| uid.to_string(), |user| user.name)
}

fn name_of_group(gid: Gid) -> String {
    Group::from_gid(gid)
        .ok()
        .flatten()
        .map_or_else(|| gid.to_string(), |group| group.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Me {
        Me {
            name: "qkd".to_owned(),
            uid: 990,
            group_name: "qkd".to_owned(),
            groups: vec![990],
        }
    }

    fn port() -> Facts {
        Facts {
            owner_uid: 0,
            group_gid: 20,
            group_name: "dialout".to_owned(),
            mode: 0o660,
            is_device: true,
            group_lists_me: false,
        }
    }

    fn said(facts: &Facts, want: Want, me: &Me) -> Option<(String, String)> {
        let advice = advise(Path::new("/dev/ttyUSB0"), facts, want, me)?;
        Some((advice.problem, advice.command?))
    }

    #[test]
    fn a_user_outside_of_the_ports_group_is_told_to_join_it() {
        let (problem, command) = said(&port(), Want::ReadWrite, &me()).unwrap();
        assert!(
            problem.contains("user qkd is not in group dialout"),
            "{problem}"
        );
        assert_eq!(command, "sudo usermod -aG dialout qkd");
    }

    #[test]
    fn a_user_who_joined_after_the_login_is_told_to_log_in_again() {
        let facts = Facts {
            group_lists_me: true,
            ..port()
        };
        let (problem, command) = said(&facts, Want::ReadWrite, &me()).unwrap();
        assert!(problem.contains("log in again"), "{problem}");
        assert_eq!(command, "newgrp dialout");
    }

    #[test]
    fn a_member_an_owner_and_root_may_use_the_port() {
        let member = Me {
            groups: vec![990, 20],
            ..me()
        };
        let owner = Facts {
            owner_uid: 990,
            ..port()
        };
        let root = Me { uid: 0, ..me() };
        assert_eq!(said(&port(), Want::ReadWrite, &member), None);
        assert_eq!(said(&owner, Want::ReadWrite, &me()), None);
        assert_eq!(said(&port(), Want::ReadWrite, &root), None);
    }

    #[test]
    fn joining_is_not_advised_where_it_would_not_help() {
        let closed = Facts {
            mode: 0o600,
            ..port()
        };
        let of_root = Facts {
            group_gid: 0,
            group_name: "root".to_owned(),
            ..port()
        };
        for facts in [closed, of_root] {
            let (problem, command) = said(&facts, Want::ReadWrite, &me()).unwrap();
            assert!(problem.contains("udev"), "{problem}");
            assert_eq!(command, "sudo chown qkd /dev/ttyUSB0");
        }
    }

    #[test]
    fn an_owner_whose_own_bits_are_missing_mends_them() {
        let facts = Facts {
            owner_uid: 990,
            mode: 0o060,
            is_device: false,
            ..port()
        };
        let (_, command) = said(&facts, Want::Take, &me()).unwrap();
        assert_eq!(command, "chmod u+rwx /dev/ttyUSB0");
    }

    #[test]
    fn a_folder_that_cannot_be_gone_through_is_named() {
        let facts = Facts {
            mode: 0o700,
            is_device: false,
            ..port()
        };
        let (problem, command) = said(&facts, Want::Enter, &me()).unwrap();
        assert!(problem.contains("may not go through it"), "{problem}");
        assert_eq!(command, "sudo chmod o+x /dev/ttyUSB0");
    }
}
