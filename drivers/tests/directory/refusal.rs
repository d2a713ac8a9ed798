//! What is not read, and what happens to it.

use super::*;

#[tokio::test]
async fn a_file_that_stops_growing_is_set_aside() {
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file()[..20]);
    folder.put("c74ebf48", &good_file()[..3]);
    let mut source = folder.open(folder.config()).await;
    let need = [(20, 24), (3, 16)];
    for (name, (have_bytes, need_bytes)) in ["c74ebf47", "c74ebf48"].into_iter().zip(need) {
        assert_eq!(
            corrupt(&mut *source).await,
            (
                Some(name.to_owned()),
                CorruptReason::Incomplete {
                    have_bytes,
                    need_bytes
                }
            )
        );
    }
    assert_eq!(folder.names("quarantine"), ["c74ebf47", "c74ebf48"]);
}

#[tokio::test]
async fn a_file_that_fails_a_check_is_set_aside_with_the_reason() {
    let mut long = good_file();
    long.extend([0; 4]);
    let mut tag = good_file();
    tag[1] = 3;
    let mut big_endian = good_file();
    big_endian[..4].copy_from_slice(&[0, 0, 0, 7]);
    let mut padding = good_file();
    padding[20] = 1;
    let mut negative = good_file();
    negative[15] = 0x80;
    let cases: [(&str, Vec<u8>, CorruptReason); 7] = [
        (
            "c74ebf47",
            long,
            CorruptReason::TooLong {
                have_bytes: 28,
                need_bytes: 24,
            },
        ),
        ("c74ebf47", tag, Type7Error::Tag { tag: 0x307 }.into()),
        ("c74ebf47", big_endian, Type7Error::BigEndian.into()),
        ("c74ebf47", padding, Type7Error::Padding.into()),
        (
            "c74ebf47",
            negative,
            Type7Error::NegativeBits {
                bits: i32::MIN + 40,
            }
            .into(),
        ),
        (
            "c74ebf48",
            good_file(),
            Type7Error::Name { epoch: EPOCH }.into(),
        ),
        (
            "c74ebf47",
            file(EPOCH, 41, &[0; 6]),
            CorruptReason::TooManyBits {
                key_bits: 41,
                max_bits: 40,
            },
        ),
    ];
    for (name, bytes, reason) in cases {
        let folder = Folder::new();
        folder.put(name, &bytes);
        folder.put("ffffffff", &file(u32::MAX, BITS, &KEY));
        let mut source = folder
            .open(DirectoryConfig {
                max_block_bits: BITS,
                ..folder.config()
            })
            .await;
        assert_eq!(corrupt(&mut *source).await, (Some(name.to_owned()), reason));
        assert_eq!(
            fs::read(folder.path("quarantine").join(name)).unwrap(),
            bytes
        );
        assert_eq!(key(&mut *source).await.1, KEY);
    }
}

#[tokio::test]
async fn what_others_could_have_made_is_refused() {
    let folder = Folder::new();
    let outside = Folder::new();
    outside.put("secret", &good_file());
    symlink(outside.path("secret"), folder.path("c74ebf47")).unwrap();
    folder.put("c74ebf48", &file(EPOCH + 1, BITS, &KEY));
    let loose = fs::Permissions::from_mode(0o620);
    fs::set_permissions(folder.path("c74ebf48"), loose).unwrap();
    nix::unistd::mkfifo(&folder.path("c74ebf49"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut source = folder.open(folder.config()).await;
    for reason in [
        CorruptReason::NotRegular,
        CorruptReason::Mode { mode: 0o620 },
        CorruptReason::NotRegular,
    ] {
        assert_eq!(corrupt(&mut *source).await.1, reason);
    }
    assert_eq!(fs::read(outside.path("secret")).unwrap(), good_file());
    assert_eq!(folder.names("."), ["quarantine"]);
}

#[tokio::test]
async fn a_file_of_a_strange_user_is_refused_unless_configured() {
    if !nix::unistd::geteuid().is_root() {
        return; // only root can give files away
    }
    let folder = Folder::new();
    folder.put("c74ebf47", &good_file());
    std::os::unix::fs::chown(folder.path("c74ebf47"), Some(12345), None).unwrap();
    let trusting = DirectoryConfig {
        owner_uids: vec![12345],
        ..folder.config()
    };
    let mut source = folder.open(trusting).await;
    assert_eq!(key(&mut *source).await.1, KEY);
    let mut source = folder.open(folder.config()).await;
    assert_eq!(
        corrupt(&mut *source).await.1,
        CorruptReason::Owner { uid: 12345 }
    );
}

#[tokio::test]
async fn strange_names_wait_and_are_set_aside_and_temporary_ones_are_left_alone() {
    let folder = Folder::new();
    for name in ["C74EBF47", "notes", ".hidden", "c74ebf47.tmp"] {
        folder.put(name, &good_file());
    }
    fs::create_dir(folder.path("c74ebf48.d")).unwrap();
    let mut source = folder.open(folder.config()).await;
    for name in ["C74EBF47", "notes"] {
        let name = name.to_owned();
        assert_eq!(
            corrupt(&mut *source).await,
            (None, CorruptReason::Name { name })
        );
    }
    fs::rename(folder.path("c74ebf47.tmp"), folder.path("c74ebf47")).unwrap();
    assert_eq!(key(&mut *source).await.1, KEY);
    assert_eq!(
        folder.names("."),
        [".hidden", "c74ebf47", "c74ebf48.d", "quarantine"]
    );
}

#[tokio::test]
async fn a_quarantine_that_cannot_be_used_is_an_alarm_and_no_loop() {
    let folder = Folder::new();
    folder.put("quarantine", b"a file where the folder should be");
    folder.put("c74ebf48", &good_file());
    let mut source = folder.open(folder.config()).await;
    corrupt(&mut *source).await;
    let Event::Alarm(Alarm { code, severity }) = event(&mut *source).await.0 else {
        panic!("an alarm was expected");
    };
    assert!(matches!(code, AlarmCode::CannotQuarantine { file, .. } if file == "c74ebf48"));
    assert_eq!(severity, Severity::Warning);
    assert_quiet(&mut *source, Duration::from_millis(80)).await;
    // Made good, it is read.
    fs::write(folder.path("c74ebf48"), file(EPOCH + 1, BITS, &KEY)).unwrap();
    assert_eq!(key(&mut *source).await.1, KEY);
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_is_named_with_what_to_do() {
    let folder = Folder::new();
    let missing = DriverConfig::Directory(DirectoryConfig::new(folder.path("missing")));
    let error = missing.open().err().unwrap();
    assert!(
        error
            .to_string()
            .contains("it does not exist; to mend it: sudo install -d"),
        "{error}"
    );

    let open_to_all = fs::Permissions::from_mode(0o777);
    fs::set_permissions(&folder.0, open_to_all).unwrap();
    let error = DriverConfig::Directory(folder.config())
        .open()
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::FolderMode { mode: 0o777, .. }));
    assert!(error.to_string().contains("chmod o-w"));

    let hasty = DirectoryConfig {
        rescan_interval_ms: 0,
        ..folder.config()
    };
    let error = DriverConfig::Directory(hasty).open().err().unwrap();
    assert_eq!(
        error.to_string(),
        "rescan_interval_ms = 0: give 10 to 3600000"
    );
}
