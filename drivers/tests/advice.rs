//! What a user is told who may not use a module: the command that mends it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use nix::unistd::geteuid;
use qkd_drivers::{DirectoryConfig, DriverConfig, SerialConfig, SharedMemoryConfig, advice};

/// Set in the process that runs as another user: the folder of the test.
const FOLDER: &str = "QKD_TEST_ADVICE_FOLDER";

/// `nobody`, who owns nothing here.
const NOBODY: u32 = 65534;

#[test]
fn what_is_not_there_or_not_a_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let said = |advice: Option<advice::Advice>| advice.unwrap().to_string();
    let missing = dir.path().join("keys");
    let text = said(advice::folder(&missing));
    assert!(
        text.contains("does not exist; to mend it: sudo install -d -m 750 -o"),
        "{text}"
    );
    let file = dir.path().join("a file's name");
    fs::write(&file, "").unwrap();
    assert!(said(advice::folder(&file)).contains("no folder"));
    assert!(said(advice::port(&file)).contains("no serial port"));
    let text = said(advice::new_socket(&file));
    assert!(
        text.contains(r"file'\''s name'"),
        "quoted for a shell: {text}"
    );
    assert!(said(advice::port(&missing)).contains("plug the device in"));
    assert_eq!(advice::folder(dir.path()), None);
    assert_eq!(advice::new_socket(&dir.path().join("x.sock")), None);
}

/// Runs the test below as a user who has no rights here. Only root can do that.
#[test]
fn a_user_without_rights_is_told_the_command_that_gives_them() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let keys = dir.path().join("keys");
    fs::create_dir(&keys).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o750)).unwrap();
    // Group 1 is `daemon` nearly everywhere, and has no members.
    chown(&keys, None, Some(1)).unwrap();
    let port = dir.path().join("port");
    fs::write(&port, "").unwrap();
    fs::set_permissions(&port, fs::Permissions::from_mode(0o660)).unwrap();
    chown(&port, None, Some(1)).unwrap();
    let test = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
    let output = Command::new(&test)
        .args(["--exact", "as_nobody", "--ignored"])
        .env(FOLDER, dir.path())
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}

#[tokio::test]
#[ignore = "run by the test above, as another user"]
async fn as_nobody() {
    let folder = std::env::var_os(FOLDER).unwrap();
    let folder = Path::new(&folder);
    let said = |driver: DriverConfig| driver.open().err().unwrap().to_string();

    let text = said(DriverConfig::Serial(SerialConfig::new(folder.join("port"))));
    assert!(text.contains("is not in group daemon"), "{text}");
    assert!(
        text.contains("to mend it: sudo usermod -aG daemon"),
        "{text}"
    );

    let text = said(DriverConfig::Directory(DirectoryConfig::new(
        folder.join("keys"),
    )));
    assert!(text.contains("may not take files out of it"), "{text}");
    assert!(text.contains("to mend it: sudo chgrp"), "{text}");

    // Inside of a folder that cannot be entered, that folder is what is to be mended.
    let inside = folder.join("keys").join("in");
    let text = said(DriverConfig::Directory(DirectoryConfig::new(&inside)));
    assert!(text.contains("keys belongs to"), "{text}");

    let text = said(DriverConfig::SharedMemory(SharedMemoryConfig::new(
        folder.join("tx.sock"),
    )));
    assert!(text.contains("to mend it: sudo chgrp"), "{text}");
}
