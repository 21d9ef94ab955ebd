package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// What stands in a message for what differs from call to call. Both have a fixed
// length, so that they are replaced in the encoded message.
const (
	numberMark = "7340215"      // the number of a secret, decimal
	serialMark = "c0ffee5ca1ab" // a number that no other call has, hexadecimal
)

// request is one RPC with its message, encoded once for all calls.
type request struct {
	Method  string
	Frame   []byte // as gRPC sends it, with its length before it
	Numbers []int  // where Frame has numberMark
	Serials []int  // where it has serialMark
	Secrets int    // the numbers are less than this
	Least   int    // bytes of the message that answers it
}

func newRequest(method string, secrets int, message proto.Message) (request, error) {
	encoded, err := proto.Marshal(message)
	if err != nil {
		return request{}, err
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(encoded))) // 0: not compressed
	frame = append(frame, encoded...)
	return request{Method: method, Frame: frame, Numbers: places(frame, numberMark), Serials: places(frame, serialMark), Secrets: secrets}, nil
}

func places(frame []byte, mark string) (all []int) {
	for at := 0; ; at += len(mark) {
		next := bytes.Index(frame[at:], []byte(mark))
		if next < 0 {
			return all
		}
		at += next
		all = append(all, at)
	}
}

// fill puts the numbers of one call into frame, which is a copy of r.Frame.
func (r *request) fill(frame []byte, number int, serial uint64) {
	for _, at := range r.Numbers {
		n := number
		for i := at + len(numberMark) - 1; i >= at; i-- {
			frame[i] = byte('0' + n%10)
			n /= 10
		}
	}
	for _, at := range r.Serials {
		n := serial
		for i := at + len(serialMark) - 1; i >= at; i-- {
			frame[i] = "0123456789abcdef"[n&15]
			n >>= 4
		}
	}
}

// call is a kind of request that is measured.
type call int

// The kinds. The size runs have coldGet on the embedded store.
const (
	cachedGet call = iota
	verifyToken
	coldGet
	put
)

func (c call) String() string {
	return [...]string{"cached Get", "VerifyToken", "cold Get", "Put"}[c]
}

// request is the call for any of so many secrets.
func (c call) request(secrets int) (r request, err error) {
	uri := &secretsv1.SecretRef{InstanceId: instance(numberMark), Kind: secretsv1.SecretKind_SECRET_KIND_DATABASE_URI}
	switch c {
	case cachedGet:
		r, err = newRequest(secretsv1.SecretsBrokerService_GetSecret_FullMethodName, secrets, &secretsv1.GetSecretRequest{Ref: uri})
		r.Least = len(databaseURI(numberMark))
	case coldGet:
		r, err = newRequest(secretsv1.SecretsBrokerService_GetSecret_FullMethodName, secrets, &secretsv1.GetSecretRequest{Ref: uri, MaxStaleness: durationpb.New(0)})
		r.Least = len(databaseURI(numberMark))
	case verifyToken:
		r, err = newRequest(secretsv1.SecretsBrokerService_VerifyToken_FullMethodName, secrets, &secretsv1.VerifyTokenRequest{InstanceId: instance(numberMark), Token: token(numberMark)})
		r.Least = proto.Size(&secretsv1.VerifyTokenResponse{Result: secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT, Generation: 1})
	case put:
		r, err = newRequest(secretsv1.SecretsBrokerService_PutSecret_FullMethodName, secrets, putRequest(numberMark, serialMark))
	}
	return r, err
}

// putRequest is a Put of another kind than what is read, so that no Get is of a
// secret that changes. It has a request id, as every Put of the client library.
func putRequest(number, serial string) *secretsv1.PutSecretRequest {
	return &secretsv1.PutSecretRequest{
		Ref:       &secretsv1.SecretRef{InstanceId: instance(number), Kind: secretsv1.SecretKind_SECRET_KIND_OIDC_CLIENT_SECRET},
		Value:     strings.Repeat("0123456789abcdef", 4) + serial,
		RequestId: "0b9d3c1e-5f7a-4d07-9c5e-" + serial,
	}
}

// digits are a number as it stands for numberMark.
func digits(number int) string { return fmt.Sprintf("%07d", number) }

func instance(number string) string { return "bench-" + number }

// token is as long as one that the broker makes.
func token(number string) string {
	return fmt.Sprintf("bench_rt_%s_%041d", number, 0)
}

func databaseURI(number string) string {
	return "postgres://app:" + number + "89abcdef@db-7.internal.example:5432/orders?sslmode=verify-full"
}

// firstSerial is where a load begins to count, so that no two of a store have a
// number in common.
func firstSerial() uint64 { return uint64(time.Now().UnixNano()) & (1<<48 - 1) }
