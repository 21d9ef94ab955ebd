package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"

	"github.com/jackc/pgx/v5"
)

// database is what the Console keeps its rows in, and where the instances'
// databases are.
type database struct {
	url string // of the Console's rows, for DATABASE_URL
	dir string // has all of its files
	// instances has the address of the instances' databases.
	instances string
	admin     string // url of an administrator; empty with SQLite
}

// errNoPostgres is for a machine without the server.
var errNoPostgres = errors.New("there is no PostgreSQL server: neither initdb in PATH nor one in /usr/lib/postgresql")

// startSQLite makes a database without a server. There are no databases for
// instances then: their addresses lead nowhere.
func startSQLite(dir string) *database {
	return &database{url: "sqlite:" + filepath.Join(dir, "console.db"), dir: dir, instances: "127.0.0.1:1"}
}

var acceptsConnections = regexp.MustCompile(`database system is ready to accept connections`)

// startPostgres makes a new PostgreSQL cluster in dir, which is empty, and runs it
// on a port of loopback that is free.
func startPostgres(ctx context.Context, s *supervisor, dir string) (*database, error) {
	bin, err := findPostgres()
	if err != nil {
		return nil, err
	}
	who, err := unprivileged()
	if err != nil {
		return nil, err
	}
	password := rand.Text()
	passwordFile, data := filepath.Join(dir, "password"), filepath.Join(dir, "data")
	if err := errors.Join(os.WriteFile(passwordFile, []byte(password), 0o600), os.Mkdir(data, 0o700)); err != nil {
		return nil, err
	}
	if who != nil {
		for _, file := range []string{dir, data, passwordFile} {
			if err := os.Chown(file, int(who.Uid), int(who.Gid)); err != nil {
				return nil, err
			}
		}
	}
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "--pgdata="+data, "--username=console", "--pwfile="+passwordFile,
		"--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync")
	initdb.Dir = dir
	initdb.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort("127.0.0.1", port)
	if _, _, err := s.start(ctx, program{
		name: "postgres",
		path: filepath.Join(bin, "postgres"),
		// Nothing here need outlive the machine; killed, it leaves nothing outside its folder.
		args: []string{"-D", data, "-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off",
			"-c", "dynamic_shared_memory_type=mmap"},
		dir:   dir,
		env:   []string{"LC_ALL=C"},
		user:  who,
		ready: acceptsConnections,
		stop:  syscall.SIGINT, // at once, without waiting for its clients
	}); err != nil {
		return nil, err
	}
	// The programs read it as whoever runs this.
	passFile := filepath.Join(dir, "pgpass")
	if err := os.WriteFile(passFile, []byte("127.0.0.1:"+port+":*:console:"+password+"\n"), 0o600); err != nil {
		return nil, err
	}
	at := func(name string) string {
		return "postgres://console@" + address + "/" + name + "?sslmode=disable&passfile=" + passFile
	}
	db := &database{url: at("console"), dir: data, instances: address, admin: at("postgres")}
	return db, db.do(ctx, `create database console`)
}

// instance makes the database of an instance, with a user of its own, and gives
// its URI.
func (d *database) instance(ctx context.Context, name, password string) (uri string, err error) {
	uri = "postgres://" + name + ":" + password + "@" + d.instances + "/" + name + "?sslmode=disable"
	if d.admin == "" {
		return uri, nil
	}
	who := pgx.Identifier{name}.Sanitize()
	return uri, d.do(ctx, `create role `+who+` login password '`+password+`'`, `create database `+who+` owner `+who)
}

func (d *database) do(ctx context.Context, statements ...string) error {
	conn, err := pgx.Connect(ctx, d.admin)
	if err != nil {
		return err
	}
	for _, statement := range statements {
		if _, e := conn.Exec(ctx, statement); e != nil {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, conn.Close(ctx))
}

// findPostgres gives the folder of the server's programs.
func findPostgres() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		path, err = filepath.EvalSymlinks(path) // postgres is beside it there
		return filepath.Dir(path), err
	}
	// Debian has them outside PATH.
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errNoPostgres
	}
	return filepath.Dir(found[len(found)-1]), nil
}

// unprivileged is whom PostgreSQL runs as: nil, this user, unless that is root,
// which it refuses.
func unprivileged() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	found, err := user.Lookup("postgres")
	if err != nil {
		found, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL does not run as root: %w", err)
	}
	uid, uidErr := strconv.ParseUint(found.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(found.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(uidErr, gidErr)
}

// freePort is a port of loopback that nobody has at the moment.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), l.Close()
}
